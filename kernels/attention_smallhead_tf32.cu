// Causal attention on tensor cores for heads of 2 and 4 components in 16-bit dtypes; formulas and
// shapes as in attention_generic.cu.
//
// Warps are independent. A warp owns ROW_BLOCKS blocks of 16 stationary rows, the A operands, and
// streams tiles of 32 rows, the B operands. Both are TF32, which holds a bf16 or f16 exactly and
// has the range of f32. An m16n8k4 mma has four slots in k, so log2(e) / sqrt(head_dim) times a
// stationary row fits as the sum of two TF32 parts, together as accurate as f32 (head_dim 4 takes
// two mma):
//
//     k slot          0       1       2      3
//     stationary row  high 0  high 1  low 0  low 1
//     streamed row    0       1       0      1
//
// The initial accumulator is -lse or minus the shift, and -delta for dout . v: p is one exponential
// of the mma result, ds one multiplication more. Both are operands of the next mma, m16n8k8,
// without a shuffle: a lane holds two columns of each of two 8-column blocks, and any eight columns
// may be summed over k if the rows loaded for them match. Of the 8 columns of that mma, head_dim
// are out or dq and one more sums p; or head_dim are dv and head_dim dk.
//
// Instructions for 16 x 8 query-key pairs, four per lane:
//
//                                          mma   ex2   add   mul   per pair
//     forward                              2     4     4           2.5
//     dq                                   3     4           4     2.75
//     dk and dv                            4     4           4     3
//
// (one more mma each at head_dim 4), plus loads, which are amortized over ROW_BLOCKS blocks.
//
// Rounding: a tensor core reads the upper 19 bits of p and ds, which truncates by less than 2^-10,
// on average by 0.72 * 2^-11. out and the sum that divides it are truncated alike, lse uses the
// untruncated p, and the other sums are multiplied by TF32_TRUNC_BIAS to correct the average.
//
// The shift is the maximum score of a row's first tiles: f32 holds up to 2^100 above it, and what
// is 2^126 below it is negligible in a sum of at least 1. If scores exceed that range, a sum
// overflows MAX_SUM, and the warp's rows are recomputed with online softmax.
//
// Launch: see each entry. Rows are aligned to their own size.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

#include <climits>

constexpr int WARPS = SMALLHEAD_WARPS;
constexpr int TILE = 32;
// Below it a sum and its inverse are normal numbers.
constexpr float MAX_SUM = 1.2676506e30f;
// Corrects the average truncation of an operand to TF32.
constexpr float TF32_TRUNC_BIAS = 1.0f + 0.72f / 2048.0f;

template <int D>
__device__ constexpr float rsqrt_head_dim() {
    return D == 2 ? 0.7071067811865476f : 0.5f;
}

// x, opaque to the optimizer: keeps expressions of it from being hoisted and held in registers.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <typename P>
__device__ inline const P *opaque(const P *x) {
    asm volatile("" : "+l"(x));
    return x;
}

// C or D fragment of an m16n8 mma, with t = lane % 4: columns 2 t and 2 t + 1 of row lane / 4, then
// of the row 8 below.
using AccFragment = float[4];

// Row of a tile that is column 2 t + `column` of an 8-column block. Tile row j is column j / 4 of
// block j % 4, so that what a lane needs of consecutive blocks is contiguous.
__device__ inline int tile_row(int block, int column) {
    return 8 * (threadIdx.x % 4) + 4 * column + block;
}

// One component of each of the 32 rows of a tile. Planes are 2 banks apart: the loads of 16 lanes
// have no bank conflicts, except at four components.
struct alignas(8) Plane {
    float at[34];

    // Address of this lane's column of blocks 0 to 3, for an m16n8k4 B operand.
    __device__ uint32_t b_k4_address() const {
        return cvta_to_shared(at + threadIdx.x % WARP_SIZE / 4 * 4);
    }
    // Address of column 2 t, for an m16n8k8 B operand; column 2 t + 1 is 16 bytes further.
    __device__ uint32_t b_k8_address() const { return cvta_to_shared(at + tile_row(0, 0)); }
};

// Initial accumulators of each block, one value per column, in the order lane t loads them for both
// of its rows.
struct alignas(16) InitialAcc {
    float at[4][4][4];

    __device__ void store_row(int row, float x) {
        float *to = at[row % 4][row / 8] + row / 4 % 2;
        to[0] = to[2] = x;
    }
};

// Sets both columns of a row. The second goes through a shuffle: as a visible copy it would share
// the first one's register and be moved into place for each mma.
__device__ inline void broadcast_row(AccFragment &to, int half, float x) {
    to[2 * half] = x;
    to[2 * half + 1] = __shfl_sync(FULL_MASK, x, threadIdx.x % WARP_SIZE);
}

// Stationary rows of a warp as A operands, in PARTS k-groups.
template <int ROW_BLOCKS, int PARTS>
struct AFragments {
    float at[ROW_BLOCKS][PARTS][2];

    // Sets component t % D of row lane / 4 + 8 half of a block to x as a high and a low part, the
    // low one in the unused k slots or in an mma of its own.
    template <int D>
    __device__ void set_split(int block, int half, float x) {
        // mutant: low_part_dropped
        const float high = cvt_rna_tf32(x), low = cvt_rna_tf32(x - high);
        if constexpr (D == 2) {
            at[block][0][half] = threadIdx.x % 4 < 2 ? high : low;
        } else {
            at[block][0][half] = high;
            at[block][1][half] = low;
        }
    }
    // Sets it to x, which is exact in TF32; `extra` goes in two parts into the unused k slots.
    template <int D>
    __device__ void set_exact(int block, int half, float x, float extra) {
        const int slot = threadIdx.x % 4;
        const float high = cvt_rna_tf32(extra);
        at[block][0][half] = slot < D ? x : slot == D ? high : cvt_rna_tf32(extra - high);
    }
    // to = block times the tile rows, of which this lane has component t % D, plus init.
    __device__ void dot(AccFragment &to, int block, float row, const AccFragment &init) const {
        mma_m16n8k4_tf32(to, at[block][0], row, init);
        if constexpr (PARTS == 2) mma_m16n8k4_tf32(to, at[block][1], row, to);
    }
};

// B operand of two m16n8k8 mma: one component of the tile rows that are columns 2 t, or 2 t + 1, of
// two consecutive blocks.
struct BFragments {
    float at[2][2];

    __device__ explicit BFragments(uint32_t rows) {
        ld_shared(at[0], rows);
        ld_shared(at[1], rows + 16);  // mutant: column_of_another_block
    }
    // acc += p of the two blocks times these rows.
    __device__ void add(AccFragment &acc, const AccFragment (&p)[2]) const {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const float a[4] = {p[0][column], p[0][2 + column], p[1][column],
                                p[1][2 + column]};
            mma_m16n8k8_tf32(acc, a, at[column][0], at[column][1]);
        }
    }
};

// Row in global memory, two components per word.
template <int D>
using PackedRow = std::conditional_t<D == 2, uint32_t, uint2>;

template <typename T>
__device__ inline void to_float2(float &first, float &second, uint32_t pair) {
    if constexpr (std::is_same_v<T, bf16>) {
        first = __uint_as_float(pair << 16);
        second = __uint_as_float(pair & 0xffff0000u);
    } else {
        const float2 both = __half22float2(reinterpret_cast<const half2 &>(pair));
        first = both.x, second = both.y;
    }
}

// Rows of a head as an opaque pointer in registers: it would be recomputed for each tile otherwise.
template <typename PackedRow, typename P>
__device__ inline const PackedRow *opaque_rows(const P *first) {
    return reinterpret_cast<const PackedRow *>(opaque(first));
}

// Stores the components of a lane's row to the planes.
template <typename T>
__device__ inline void store_row(Plane *planes, uint32_t row) {
    float first, second;
    to_float2<T>(first, second, row);
    planes[0].at[threadIdx.x % WARP_SIZE] = first;
    planes[1].at[threadIdx.x % WARP_SIZE] = second;
}
template <typename T>
__device__ inline void store_row(Plane *planes, uint2 row) {
    store_row<T>(planes, row.x);
    store_row<T>(planes + 2, row.y);
}

// Keys and values of a head, tile by tile. Past the end the last row repeats; it is masked.
template <typename T, int D>
struct KvStream {
    const PackedRow<D> *k, *v;
    int last;
    Plane *planes;
    PackedRow<D> key, value;

    __device__ void load_next(int first) {
        const int position = min(first + static_cast<int>(threadIdx.x % WARP_SIZE), last);
        key = __ldg(k + position), value = __ldg(v + position);
    }
    // Stores the prefetched tile and prefetches the next.
    __device__ void advance(int first) {
        __syncwarp();
        store_row<T>(planes, key);
        store_row<T>(planes + D, value);
        __syncwarp();  // mutant: tile_read_early
        load_next(first + TILE);
    }
};

// Query rows of a warp, from `first` on.
template <int D, int ROW_BLOCKS>
struct Queries {
    AFragments<ROW_BLOCKS, D / 2> q;
    const uint32_t *first_key;
    int first, seq_len, lane;

    __device__ int position(int block, int half) const {
        return first + MMA_ROWS * block + 8 * half + lane / 4;
    }
    // First key a row sees. Rows past seq_len see every key, so that they force no mask.
    __device__ int first_visible_of(int block, int half) const {
        const int row = position(block, half);
        return row < seq_len ? first_visible(first_key, row) : 0;
    }
    template <typename T>
    __device__ void load_queries(const T *rows, const uint32_t *first_keys, int first_row,
                                 int end) {
        first_key = first_keys, first = first_row, seq_len = end;
        lane = threadIdx.x % WARP_SIZE;
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = position(m, half);
                const float x =
                    row < seq_len ? to_float(rows[static_cast<size_t>(row) * D + lane % D]) : 0.0f;
                q.template set_split<D>(m, half, x * (rsqrt_head_dim<D>() * LOG2E));
            }
        }
    }
    // First key that any row of the warp sees, and first key that all rows see.
    __device__ void visible_range(int &begin, int &masked_until) const {
        begin = INT_MAX, masked_until = 0;
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; i++) {
            const int from = first_visible_of(i / 2, i % 2);
            begin = min(begin, from), masked_until = max(masked_until, from);
        }
        begin = __reduce_min_sync(FULL_MASK, begin);
        masked_until = __reduce_max_sync(FULL_MASK, masked_until);
    }
    // Sets the scores of hidden keys to -inf.
    __device__ void mask(AccFragment &scores, int block, int tile, int i) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // opaque: all of them would be kept in registers otherwise.
            const int row = position(block, half), from = first_visible_of(block, opaque(half));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int key = tile + tile_row(i, j);
                if (key < from || row < key) scores[2 * half + j] = -INFINITY;
            }
        }
    }
};

template <int D, int ROW_BLOCKS>
struct Forward : Queries<D, ROW_BLOCKS> {
    AccFragment init[ROW_BLOCKS], acc[ROW_BLOCKS];
    // Sum of untruncated p, for lse; this lane's part.
    float row_sum[ROW_BLOCKS][2];

    __device__ void first_masked() {
#pragma unroll
        for (int i = 0; i < 4 * ROW_BLOCKS; i++) {
            init[i / 4][i % 4] = INFINITY;
            acc[i / 4][i % 4] = row_sum[i / 4][i % 2] = 0.0f;
        }
    }

    // Fast path: a tile visible to all rows, which have a shift.
    __device__ void add(uint32_t keys_at, uint32_t values_at) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float keys[2];
            ld_shared(keys, keys_at + 4 * i);
            const BFragments b_k8_address(values_at + 4 * i);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                AccFragment p[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    this->q.dot(p[j], m, keys[j], init[m]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        p[j][e] = ex2_approx(p[j][e]);
                        row_sum[m][e / 2] += p[j][e];
                    }
                }
                b_k8_address.add(acc[m], p);
            }
        }
    }

    // Online-softmax path: any tile, with masks; the shift becomes the maximum score.
    __device__ void add_online(uint32_t keys_at, uint32_t values_at, int tile) {
        float keys[2][2];
        ld_shared(keys[0], keys_at);
        ld_shared(keys[1], keys_at + 8);
        const BFragments rights[2] = {BFragments(values_at), BFragments(values_at + 8)};
        const AccFragment zero = {};
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
            if (this->first + MMA_ROWS * m + MMA_ROWS <= tile) continue;
            AccFragment p[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                this->q.dot(p[i / 2][i % 2], m, keys[i / 2][i % 2], zero);
                this->mask(p[i / 2][i % 2], m, tile, i);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shift = -init[m][2 * half];
                float new_max = shift;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const AccFragment &s = p[i / 2][i % 2];
                    new_max = fmaxf(new_max, fmaxf(s[2 * half], s[2 * half + 1]));
                }
                // Four lanes share a row.
                new_max = fmaxf(new_max, __shfl_xor_sync(FULL_MASK, new_max, 1));
                new_max = fmaxf(new_max, __shfl_xor_sync(FULL_MASK, new_max, 2));
                // Avoid (-inf) - (-inf) = NaN for rows that have seen no key yet.
                const float base = new_max == -INFINITY ? 0.0f : new_max;
                const float rescale = ex2_approx(shift - base);
                row_sum[m][half] *= rescale;
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    acc[m][e] *= rescale;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float &score = p[i / 2][i % 2][e];
                        score = ex2_approx(score - base);
                        row_sum[m][half] += score;
                    }
                }
                broadcast_row(init[m], half, -new_max);
            }
            rights[0].add(acc[m], p[0]);
            rights[1].add(acc[m], p[1]);
        }
    }

    // Whether all sums are below MAX_SUM.
    __device__ bool in_range() const {
        bool finite = true;
#pragma unroll
        for (int i = 0; i < 4 * ROW_BLOCKS; i++) finite &= fabsf(acc[i / 4][i % 4]) < MAX_SUM;
        return __all_sync(FULL_MASK, finite);
    }
};

template <int D, int ROW_BLOCKS, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const AttentionShape shape) {
    constexpr int CHUNK = MMA_ROWS * ROW_BLOCKS;
    // Components of k, of v, and ones.
    __shared__ Plane tiles[WARPS][2 * D + 1];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    Plane *planes = tiles[warp];
    planes[2 * D].at[lane] = 1.0f;
    const uint32_t keys_at = planes[lane % D].b_k4_address();
    // Columns from D on sum p; one of them is used.
    const uint32_t values_at = planes[D + min(lane / 4, D)].b_k8_address();
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        // Longest rows first; consecutive tasks share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), kv_row = shape.kv_row(head);
        Forward<D, ROW_BLOCKS> rows;
        rows.load_queries(q + row * D, first_key + shape.sequence(head) * shape.seq_len, first,
                       shape.seq_len);
        int begin, masked_until;
        rows.visible_range(begin, masked_until);
        begin = begin / TILE * TILE;
        const int end = min(first + CHUNK, shape.seq_len);

        bool online = false;
        do {
            bool in_range = true;
            rows.first_masked();
            KvStream<T, D> keys{opaque_rows<PackedRow<D>>(k + kv_row * D),
                                opaque_rows<PackedRow<D>>(v + kv_row * D),
                                shape.seq_len - 1, planes};
            keys.load_next(begin);
            // A row has no shift before the tile of its first key is done.
            const int first_unmasked = online ? end : masked_until + 1;
            const int last_unmasked = first + 1 - TILE;
            for (int tile = begin;; tile += TILE) {
                for (; first_unmasked <= tile && tile <= last_unmasked; tile += TILE) {
                    keys.advance(tile);
                    rows.add(keys_at, values_at);
                }
                // Rescaling sums of at most MAX_SUM flushes to zero only what is negligible.
                in_range &= rows.in_range();  // mutant: overflow_before_the_last_tile_not_detected
                if (tile >= end) break;
                keys.advance(tile);
                rows.add_online(keys_at, values_at, tile);
            }
            if (online) break;
            online = !in_range;  // mutant: overflow_not_detected
        } while (online);

#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = rows.position(m, half);
                float row_sum = rows.row_sum[m][half];
                row_sum += __shfl_xor_sync(FULL_MASK, row_sum, 1);
                row_sum += __shfl_xor_sync(FULL_MASK, row_sum, 2);
                // Sum of truncated p, as in `out`.
                const float p_sum =
                    __shfl_sync(FULL_MASK, rows.acc[m][2 * half], lane / 4 * 4 + D / 2);
                if (position >= shape.seq_len) continue;
                const bool any_visible = p_sum > 0.0f;
                if (lane % 4 == D / 2) {
                    lse[row + position] =
                        any_visible ? (log2f(row_sum) - rows.init[m][2 * half]) * LN2 : 0.0f;
                }
                if (lane % 4 >= D / 2) continue;
                const float inverse_sum = any_visible ? 1.0f / p_sum : 0.0f;
                const float values[2] = {rows.acc[m][2 * half] * inverse_sum,
                                         rows.acc[m][2 * half + 1] * inverse_sum};
                store(out + shape.out_row(head, position) * D + lane % 4 * 2, values);
            }
        }
    }
}

template <int D, int ROW_BLOCKS>
struct BackwardDq : Queries<D, ROW_BLOCKS> {
    AFragments<ROW_BLOCKS, 1> dout;
    AccFragment lse[ROW_BLOCKS], delta[ROW_BLOCKS], dq[ROW_BLOCKS];

    template <bool MASKED>
    __device__ void add(uint32_t keys_at, uint32_t values_at, uint32_t k_at, int tile) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float keys[2], values[2];
            ld_shared(keys, keys_at + 4 * i);
            ld_shared(values, values_at + 4 * i);
            const BFragments b_k8_address(k_at + 4 * i);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                if (MASKED && this->first + MMA_ROWS * m + MMA_ROWS <= tile) continue;
                AccFragment ds[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    AccFragment p;
                    this->q.dot(p, m, keys[j], lse[m]);
                    if (MASKED) this->mask(p, m, tile, i + j);
                    dout.dot(ds[j], m, values[j], delta[m]);
#pragma unroll
                    for (int e = 0; e < 4; e++) ds[j][e] *= ex2_approx(p[e]);
                }
                b_k8_address.add(dq[m], ds);
            }
        }
    }
};

template <int D, int ROW_BLOCKS, typename T>
__device__ void backward_dq(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const AttentionShape shape) {
    constexpr int CHUNK = MMA_ROWS * ROW_BLOCKS;
    // Components of k, of v, and ones for the k slots that v does not use.
    __shared__ Plane tiles[WARPS][D + 4];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    Plane *planes = tiles[warp];
    for (int i = D; i < 4; i++) planes[D + i].at[lane] = 1.0f;
    const uint32_t keys_at = planes[lane % D].b_k4_address();
    const uint32_t values_at = planes[D + lane % 4].b_k4_address();
    // Columns from D on are unused.
    const uint32_t k_at = planes[lane / 4 % D].b_k8_address();
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), kv_row = shape.kv_row(head);
        BackwardDq<D, ROW_BLOCKS> rows;
        rows.load_queries(q + row * D, first_key + shape.sequence(head) * shape.seq_len, first,
                       shape.seq_len);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = rows.position(m, half);
                const bool valid = position < shape.seq_len;
                const size_t at = shape.out_row(head, position) * D + lane % D;
                // mutant: no_delta
                const float minus_delta = valid ? -delta[row + position] : 0.0f;
                rows.dout.template set_exact<D>(m, half, valid ? to_float(dout[at]) : 0.0f,
                                                minus_delta);
                broadcast_row(rows.lse[m], half, valid ? -lse[row + position] * LOG2E : 0.0f);
                // At head_dim 2 it is in the unused k slots.
                if constexpr (D == 4) {
                    broadcast_row(rows.delta[m], half, minus_delta);
                } else {
                    rows.delta[m][2 * half] = rows.delta[m][2 * half + 1] = 0.0f;
                }
                rows.dq[m][2 * half] = rows.dq[m][2 * half + 1] = 0.0f;
            }
        }
        int begin, masked_until;
        rows.visible_range(begin, masked_until);
        begin = begin / TILE * TILE;
        const int end = min(first + CHUNK, shape.seq_len);

        KvStream<T, D> keys{opaque_rows<PackedRow<D>>(k + kv_row * D),
                            opaque_rows<PackedRow<D>>(v + kv_row * D),
                            shape.seq_len - 1, planes};
        keys.load_next(begin);
        const int last_unmasked = first + 1 - TILE;
        for (int tile = begin;; tile += TILE) {
            for (; masked_until <= tile && tile <= last_unmasked; tile += TILE) {
                keys.advance(tile);
                rows.template add<false>(keys_at, values_at, k_at, tile);
            }
            if (tile >= end) break;
            keys.advance(tile);
            rows.template add<true>(keys_at, values_at, k_at, tile);
        }
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = rows.position(m, half);
                if (position >= shape.seq_len || lane % 4 >= D / 2) continue;
                const float *pair = rows.dq[m] + 2 * half;
                const float values[2] = {pair[0] * (rsqrt_head_dim<D>() * TF32_TRUNC_BIAS),
                                         pair[1] * (rsqrt_head_dim<D>() * TF32_TRUNC_BIAS)};
                store(dq + (row + position) * D + lane % 4 * 2, values);
            }
        }
    }
}

// Queries of a head with dout, lse and delta, tile by tile. Past the end the last row repeats.
template <typename T, int D>
struct QueryStream {
    struct Tile {
        // Components of q, of dout, and zeros.
        Plane planes[2 * D + 1];
        InitialAcc lse, delta;
        int from[TILE];
    };
    const PackedRow<D> *q, *dout;
    const float *lse, *delta;
    // Query heads: consecutive rows of dout are this many rows apart.
    int heads, last;
    Tile &tile;
    PackedRow<D> next_q, next_dout;
    float next_lse, next_delta;

    __device__ void load_next(int first) {
        const int position = min(first + static_cast<int>(threadIdx.x % WARP_SIZE), last);
        next_q = __ldg(q + position), next_dout = __ldg(dout + position * heads);
        next_lse = __ldg(lse + position), next_delta = __ldg(delta + position);
    }
    // Stores the prefetched tile and prefetches the next.
    __device__ void advance(int first) {
        const int lane = threadIdx.x % WARP_SIZE;
        __syncwarp();
        store_row<T>(tile.planes, next_q);
        store_row<T>(tile.planes + D, next_dout);
        tile.lse.store_row(lane, -LOG2E * next_lse);
        tile.delta.store_row(lane, next_delta);
        __syncwarp();
        load_next(first + TILE);
    }
};

// Key rows of a warp, from `first` on.
template <int D, int ROW_BLOCKS>
struct BackwardDkdv {
    AFragments<ROW_BLOCKS, D / 2> k;
    AFragments<ROW_BLOCKS, 1> v;
    // dv in columns from 0 on, dk in columns from D on.
    AccFragment acc[ROW_BLOCKS];
    int first, lane;
    // Addresses in a tile for this lane: q (dout is D planes further) as m16n8k4 B operands, dout
    // and q as m16n8k8 B operands, and the initial accumulators.
    uint32_t qk_at, dout_at, q_at, starts_at;

    __device__ int position(int block, int half) const {
        return first + MMA_ROWS * block + 8 * half + lane / 4;
    }

    template <bool MASKED, typename Tile>
    __device__ void add(const Tile &tile, int first_query) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float queries[2], douts[2];
            ld_shared(queries, qk_at + 4 * i);
            ld_shared(douts, qk_at + 4 * i + D * sizeof(Plane));
            const BFragments dout(dout_at + 4 * i), q(q_at + 4 * i);
            AccFragment lse[2], delta[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                ld_shared(lse[j], starts_at + (i + j) * 64);
                ld_shared(delta[j], starts_at + (i + j) * 64 + sizeof(InitialAcc));
            }
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                if (MASKED && first_query + TILE <= first + MMA_ROWS * m) continue;
                AccFragment p[2], ds[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    k.dot(p[j], m, queries[j], lse[j]);
                    v.dot(ds[j], m, douts[j], delta[j]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int at = tile_row(i + j, e % 2), key = position(m, e / 2);
                        p[j][e] = ex2_approx(p[j][e]);
                        if (MASKED && (key < tile.from[at] || first_query + at < key)) {
                            p[j][e] = 0.0f;
                        }
                        ds[j][e] *= p[j][e];
                    }
                }
                dout.add(acc[m], p);
                q.add(acc[m], ds);
            }
        }
    }
};

// Maximum warps per block of the dk and dv pass.
__host__ __device__ constexpr int max_warps(int row_blocks) {
    return row_blocks == 1 ? SMALLHEAD_DKDV_WARPS[0] : SMALLHEAD_DKDV_WARPS[1];
}

// A block takes one range of keys; its warps split the query heads of the group, and their partial
// sums are added in warp order.
template <int D, int ROW_BLOCKS, typename T>
__device__ void backward_dkdv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const AttentionShape shape) {
    constexpr int CHUNK = MMA_ROWS * ROW_BLOCKS;
    __shared__ typename QueryStream<T, D>::Tile tiles[max_warps(ROW_BLOCKS)];
    // dv and dk.
    __shared__ float acc[CHUNK][2 * D];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int warps = blockDim.x / WARP_SIZE;
    typename QueryStream<T, D>::Tile &tile = tiles[warp];
    tile.planes[2 * D].at[lane] = 0.0f;
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.batch * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        const int kv_head = task % kv_heads, first = task / kv_heads * CHUNK;
        const int end_row = min(first + CHUNK, shape.seq_len);
        const size_t kv_row = static_cast<size_t>(kv_head) * shape.seq_len;
        BackwardDkdv<D, ROW_BLOCKS> rows;
        rows.first = first, rows.lane = lane;
        rows.qk_at = tile.planes[lane % D].b_k4_address();
        rows.dout_at = tile.planes[lane / 4 < D ? D + lane / 4 : 2 * D].b_k8_address();
        rows.q_at = tile.planes[lane / 4 / D == 1 ? lane / 4 - D : 2 * D].b_k8_address();
        rows.starts_at = cvta_to_shared(tile.lse.at[0][lane % 4]);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = rows.position(m, half);
                const size_t at = (kv_row + position) * D + lane % D;
                const bool valid = position < shape.seq_len;
                const float key = valid ? to_float(k[at]) * (rsqrt_head_dim<D>() * LOG2E) : 0.0f;
                rows.k.template set_split<D>(m, half, key);
                rows.v.template set_exact<D>(m, half, valid ? -to_float(v[at]) : 0.0f, 0.0f);
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) rows.acc[m][e] = 0.0f;
            }
        }
        // From query `first_masked` on some keys may be hidden; from `end` on all are.
        const uint32_t *first_keys =
            first_key + shape.sequence(kv_head * shape.group()) * shape.seq_len;
        int first_masked = shape.seq_len, end = first;
        for (int position = first + lane; position < shape.seq_len; position += WARP_SIZE) {
            const int visible_range = first_visible(first_keys, position);
            if (visible_range > first) first_masked = min(first_masked, position);
            if (visible_range < end_row) end = max(end, position + 1);
        }
        first_masked = __reduce_min_sync(FULL_MASK, first_masked);
        end = __reduce_max_sync(FULL_MASK, end);
        const int first_unmasked = first + CHUNK - 1;
        const int last_unmasked = min(first_masked, end) - TILE;  // mutant: mask_skipped

        for (int member = warp; member < shape.group(); member += warps) {
            const int head = kv_head * shape.group() + member;
            const size_t row = shape.row(head, 0);
            QueryStream<T, D> stream{opaque_rows<PackedRow<D>>(q + row * D),
                                opaque_rows<PackedRow<D>>(dout + shape.out_row(head, 0) * D),
                                opaque_rows<float>(lse + row), opaque_rows<float>(delta + row),
                                shape.heads, shape.seq_len - 1, tile};
            stream.load_next(first);
            for (int at = first;; at += TILE) {
                for (; first_unmasked <= at && at <= last_unmasked; at += TILE) {
                    stream.advance(at);
                    rows.template add<false>(tile, at);
                }
                if (at >= end) break;
                const int position = at + lane;
                __syncwarp();
                // A query past the end sees no key.
                tile.from[lane] =
                    // mutant: query_past_the_end_visible
                    position < shape.seq_len ? first_visible(first_keys, position) : INT_MAX;
                stream.advance(at);
                rows.template add<true>(tile, at);
            }
        }
        for (int owner = 0; owner < warps; owner++) {  // mutant: other_warps_dropped
            if (owner == warp && lane % 4 < D) {
#pragma unroll
                for (int i = 0; i < 4 * ROW_BLOCKS; i++) {
                    const int local_row = rows.position(i / 4, i % 4 / 2) - first;
                    float &row_sum = acc[local_row][lane % 4 * 2 + i % 2];
                    row_sum = rows.acc[i / 4][i % 4] + (owner == 0 ? 0.0f : row_sum);
                }
            }
            __syncthreads();
        }
        for (int local_row = threadIdx.x; first + local_row < end_row; local_row += blockDim.x) {
            float key[D], value[D];
#pragma unroll
            for (int c = 0; c < D; c++) {
                value[c] = acc[local_row][c] * TF32_TRUNC_BIAS;
                key[c] = acc[local_row][D + c] * (-rsqrt_head_dim<D>() * TF32_TRUNC_BIAS);
            }
            store(dk + (kv_row + first + local_row) * D, key);
            store(dv + (kv_row + first + local_row) * D, value);
        }
        // The next task must not overwrite sums that a slower warp still reads.
        __syncthreads();
    }
}

// Minimum resident blocks of 128 threads per SM (`__launch_bounds__`).
constexpr int min_blocks(int head_dim, int row_blocks) {
    return row_blocks == 1 ? 4 : head_dim == 2 && row_blocks == 4 ? 3 : 2;
}

// Entry names end in head_dim, 16-row blocks per warp and dtype. Several blocks amortize the loads
// of a tile; one block per warp gives the most warps for small problems. Launch of forward and dq:
// blocks of 128 threads, any grid along x; one warp per 16 ROW_BLOCKS rows of a head is best.
// Launch of dk and dv: blocks of one to max_warps(ROW_BLOCKS) warps, best as many as query heads
// share a key/value head; one block per 16 ROW_BLOCKS rows of a key/value head.

#define FORWARD_AND_DQ(D, BLOCKS, T)                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, min_blocks(D, BLOCKS))         \
    attention_smallhead_tf32_##D##_##BLOCKS##_##T(                                                 \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        forward<D, BLOCKS>(q, k, v, first_key, out, lse,                                           \
                               {batch, seq_len, heads, kv_heads, D});                              \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, min_blocks(D, BLOCKS))         \
    attention_smallhead_tf32_backward_dq_##D##_##BLOCKS##_##T(                                     \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        backward_dq<D, BLOCKS>(q, k, v, first_key, lse, delta, dout, dq,                           \
                                   {batch, seq_len, heads, kv_heads, D});                          \
    }

#define DKDV(D, BLOCKS, T)                                                                         \
    extern "C" __global__ void                                                                     \
    __launch_bounds__(32 * max_warps(BLOCKS),                                                      \
                      min_blocks(D, BLOCKS) * 4 / max_warps(BLOCKS))                               \
    attention_smallhead_tf32_backward_dkdv_##D##_##BLOCKS##_##T(                                   \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int batch, int seq_len, int heads, int kv_heads) {                     \
        backward_dkdv<D, BLOCKS>(q, k, v, first_key, lse, delta, dout, dk, dv,                     \
                                     {batch, seq_len, heads, kv_heads, D});                        \
    }

#define ENTRIES(T)                                                                                 \
    FORWARD_AND_DQ(2, 4, T)                                                                        \
    FORWARD_AND_DQ(4, 4, T)                                                                        \
    FORWARD_AND_DQ(2, 1, T)                                                                        \
    FORWARD_AND_DQ(4, 1, T)                                                                        \
    DKDV(2, 8, T)                                                                                  \
    DKDV(4, 4, T)                                                                                  \
    DKDV(2, 1, T)                                                                                  \
    DKDV(4, 1, T)

ENTRIES(bf16)
ENTRIES(f16)
