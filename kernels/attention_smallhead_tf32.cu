// Causal attention on tensor cores for heads of 2 and 4 components in two-byte types; formulas and
// shapes as in attention_generic.cu.
//
// A warp works alone. It owns OWN blocks of 16 rows, the left operands of its products, and streams
// tiles of 32 opposite rows, the right ones. Both are TF32: it holds a bf16 or f16 exactly, and the
// range of f32. A product of m16n8k4 has four slots for what is summed, so there is room for
// log2(e) / sqrt(head_dim) times an own row in two parts, that together are as exact as an f32
// (head_dim 4 takes two products):
//
//     slot          0       1       2      3
//     own row       high 0  high 1  low 0  low 1
//     opposite row  0       1       0      1
//
// -lse, or the shift, is what the product is added to, as -delta is for dout . v: p is one
// exponential of what leaves the tensor core, ds one product more. Both go into the next product,
// m16n8k8, as they lie: of two blocks of 8 columns a lane holds two columns each, and any columns
// will do for the eight that are summed up, if the row loaded for each is the right one. Of the 8
// columns of that product head_dim are out or dq, and one more sums up p; or head_dim are dv and
// head_dim dk.
//
// 16 x 8 pairs, four a lane, take          mma   ex2   add   mul   instructions a pair
//
//     forward                              2     4     4           2.5
//     back to q                            3     4           4     2.75
//     back to k and v                      4     4           4     3
//
// (one mma more each at head_dim 4), and the loads, which are shared by OWN blocks.
//
// Rounding: a tensor core reads the upper 19 bits of p and ds. That takes off less than 2^-10, on
// the average 0.72 * 2^-11. Of out it takes as much as of the sum that out is divided by, lse comes
// of the whole p, and the other sums are given the average back.
//
// The shift is the highest score of a row's first tiles: f32 holds what is up to 2^100 above it,
// and what is 2^126 below it is nothing in a sum of 1 at least. If scores rise further, a sum shows
// it, and the warp's rows are done once more, with a maximum that is kept.
//
// Launch: see each entry. Rows are aligned to their own size.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

#include <climits>

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 4;
constexpr int BLOCK = 16, TILE = 32;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// Below it a sum and its inverse are normal numbers.
constexpr float LIMIT = 1.2676506e30f;
// What TF32 takes off, given back.
constexpr float REGAIN = 1.0f + 0.72f / 2048.0f;

template <int D>
__device__ constexpr float root() {
    return D == 2 ? 0.7071067811865476f : 0.5f;
}

// x as the compiler knows nothing of it: what is made of it is made here and now.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <typename P>
__device__ inline const P *opaque(const P *x) {
    asm volatile("" : "+l"(x));
    return x;
}

// D of an m16n8 product, with t = lane % 4: of the row lane / 4, the columns 2 t and 2 t + 1; of
// the row 8 below, the same.
using Product = float[4];

// A tile is four blocks of 8 columns: its row j is column j / 4 of block j % 4. So what a lane
// needs of neighbouring blocks lies side by side, and its columns 2 t and 2 t + 1 of a block are
// the rows
__device__ inline int tile_row(int block, int column) {
    return 8 * (threadIdx.x % 4) + 4 * column + block;
}

// One number of each of a tile's 32 rows. Neighbours of these lie 2 banks apart: what 16 lanes load
// of them meets no conflict, but where components are four.
struct alignas(8) Plane {
    float at[34];

    // Where this lane finds its column of the blocks 0 to 3 for a first product.
    __device__ uint32_t left() const { return shared_address(at + threadIdx.x % WARP / 4 * 4); }
    // And column 2 t for a second one; column 2 t + 1 is 16 bytes behind it.
    __device__ uint32_t right() const { return shared_address(at + tile_row(0, 0)); }
};

// What the products of each block begin with, of one number a column: as lane t takes it up, for
// both of its rows.
struct alignas(16) Starts {
    float at[4][4][4];

    __device__ void put(int row, float x) {
        float *to = at[row % 4][row / 8] + row / 4 % 2;
        to[0] = to[2] = x;
    }
};

// Both columns of a row. The second goes a way that the compiler cannot look through: as a known
// copy it would share the first one's register, and be copied into place for each product.
__device__ inline void set(Product &to, int half, float x) {
    to[2 * half] = x;
    to[2 * half + 1] = __shfl_sync(ALL, x, threadIdx.x % WARP);
}

// Own rows of a warp that are a left operand, in PARTS parts.
template <int OWN, int PARTS>
struct Left {
    float at[OWN][PARTS][2];

    // Component t % D of a block's row lane / 4 + 8 half is x: in a high and a low part, the second
    // in the slots that are left or in a product of its own.
    template <int D>
    __device__ void split(int block, int half, float x) {
        const float high = tf32(x), low = tf32(x - high);
        if constexpr (D == 2) {
            at[block][0][half] = threadIdx.x % 4 < 2 ? high : low;
        } else {
            at[block][0][half] = high;
            at[block][1][half] = low;
        }
    }
    // The same where x is a TF32 as it is; `rest` in two parts in the slots that are left.
    template <int D>
    __device__ void whole(int block, int half, float x, float rest) {
        const int slot = threadIdx.x % 4;
        const float high = tf32(rest);
        at[block][0][half] = slot < D ? x : slot == D ? high : tf32(rest - high);
    }
    // A block times the tile rows of which this lane has component t % D.
    __device__ void dot(Product &to, int block, float row, const Product &start) const {
        multiply_add_tf32(to, at[block][0], row, start);
        if constexpr (PARTS == 2) multiply_add_tf32(to, at[block][1], row, to);
    }
};

// The right operand of two second products: of the column lane / 4, a number of the tile rows that
// are columns 2 t, or 2 t + 1, of two neighbouring blocks.
struct Right {
    float at[2][2];

    __device__ explicit Right(uint32_t rows) {
        load_shared(at[0], rows);
        load_shared(at[1], rows + 16);
    }
    // sums += weights of the two blocks times these rows.
    __device__ void add(Product &sums, const Product (&weights)[2]) const {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const float a[4] = {weights[0][column], weights[0][2 + column], weights[1][column],
                                weights[1][2 + column]};
            multiply_add_tf32(sums, a, at[column][0], at[column][1]);
        }
    }
};

// A row as it lies in memory, two components a word.
template <int D>
using Row = std::conditional_t<D == 2, uint32_t, uint2>;

template <typename T>
__device__ inline void widen(float &first, float &second, uint32_t pair) {
    if constexpr (std::is_same_v<T, bf16>) {
        first = __uint_as_float(pair << 16);
        second = __uint_as_float(pair & 0xffff0000u);
    } else {
        const float2 both = __half22float2(reinterpret_cast<const half2 &>(pair));
        first = both.x, second = both.y;
    }
}

// The rows of a head, as a pointer in registers: else it would be put together anew for each tile.
template <typename Row, typename P>
__device__ inline const Row *rows_at(const P *first) {
    return reinterpret_cast<const Row *>(opaque(first));
}

// Puts the components of a lane's row where products look for them.
template <typename T>
__device__ inline void put(Plane *planes, uint32_t row) {
    float first, second;
    widen<T>(first, second, row);
    planes[0].at[threadIdx.x % WARP] = first;
    planes[1].at[threadIdx.x % WARP] = second;
}
template <typename T>
__device__ inline void put(Plane *planes, uint2 row) {
    put<T>(planes, row.x);
    put<T>(planes + 2, row.y);
}

// Keys and values of a head, tile by tile. Behind the last comes the last once more: nobody sees
// it.
template <typename T, int D>
struct Keys {
    const Row<D> *k, *v;
    int last;
    Plane *planes;
    Row<D> key, value;

    __device__ void fetch(int first) {
        const int column = min(first + static_cast<int>(threadIdx.x % WARP), last);
        key = __ldg(k + column), value = __ldg(v + column);
    }
    // Puts the tile that was fetched, and fetches the next.
    __device__ void next(int first) {
        __syncwarp();
        put<T>(planes, key);
        put<T>(planes + D, value);
        __syncwarp();
        fetch(first + TILE);
    }
};

// The query rows of a warp: `first` and those behind it.
template <int D, int OWN>
struct Queries {
    Left<OWN, D / 2> q;
    const uint32_t *first_key;
    int first, context, lane;

    __device__ int column(int block, int half) const {
        return first + BLOCK * block + 8 * half + lane / 4;
    }
    // The first column that a row sees. Rows past the context see all: they force no mask.
    __device__ int from_of(int block, int half) const {
        const int row = column(block, half);
        return row < context ? first_seen(first_key, row) : 0;
    }
    template <typename T>
    __device__ void load_rows(const T *rows, const uint32_t *first_keys, int first_row, int end) {
        first_key = first_keys, first = first_row, context = end;
        lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = column(m, half);
                const float x =
                    row < context ? widen(rows[static_cast<size_t>(row) * D + lane % D]) : 0.0f;
                q.template split<D>(m, half, x * (root<D>() * LOG2E));
            }
        }
    }
    // The first column that any row of the warp sees, and the one from which on all of them see.
    __device__ void seen(int &least, int &most) const {
        least = INT_MAX, most = 0;
#pragma unroll
        for (int i = 0; i < 2 * OWN; i++) {
            const int from = from_of(i / 2, i % 2);
            least = min(least, from), most = max(most, from);
        }
        least = __reduce_min_sync(ALL, least);
        most = __reduce_max_sync(ALL, most);
    }
    // Scores of what a row does not see become -inf.
    __device__ void mask(Product &scores, int block, int tile, int i) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Else all of them would be kept in registers.
            const int row = column(block, half), from = from_of(block, opaque(half));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int key = tile + tile_row(i, j);
                if (key < from || row < key) scores[2 * half + j] = -INFINITY;
            }
        }
    }
};

template <int D, int OWN>
struct Forward : Queries<D, OWN> {
    Product start[OWN], sums[OWN];
    // Of p as it is, for lse; a lane's share.
    float sum[OWN][2];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) {
            start[i / 4][i % 4] = INFINITY;
            sums[i / 4][i % 4] = sum[i / 4][i % 2] = 0.0f;
        }
    }

    // A tile that all rows see whole, and have a shift for.
    __device__ void add(uint32_t keys_at, uint32_t values_at) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float keys[2];
            load_shared(keys, keys_at + 4 * i);
            const Right right(values_at + 4 * i);
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                Product p[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    this->q.dot(p[j], m, keys[j], start[m]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        p[j][e] = exp2_approx(p[j][e]);
                        sum[m][e / 2] += p[j][e];
                    }
                }
                right.add(sums[m], p);
            }
        }
    }

    // Any tile: with masks, and a shift that becomes the highest score.
    __device__ void add_with_care(uint32_t keys_at, uint32_t values_at, int tile) {
        float keys[2][2];
        load_shared(keys[0], keys_at);
        load_shared(keys[1], keys_at + 8);
        const Right rights[2] = {Right(values_at), Right(values_at + 8)};
        const Product zero = {};
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            if (this->first + BLOCK * m + BLOCK <= tile) continue;
            Product p[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                this->q.dot(p[i / 2][i % 2], m, keys[i / 2][i % 2], zero);
                this->mask(p[i / 2][i % 2], m, tile, i);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shift = -start[m][2 * half];
                float top = shift;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const Product &part = p[i / 2][i % 2];
                    top = fmaxf(top, fmaxf(part[2 * half], part[2 * half + 1]));
                }
                // Four lanes share a row.
                top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
                // While nothing was seen, -inf less -inf must not be taken.
                const float base = top == -INFINITY ? 0.0f : top;
                const float shrink = exp2_approx(shift - base);
                sum[m][half] *= shrink;
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    sums[m][e] *= shrink;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float &score = p[i / 2][i % 2][e];
                        score = exp2_approx(score - base);
                        sum[m][half] += score;
                    }
                }
                set(start[m], half, -top);
            }
            rights[0].add(sums[m], p[0]);
            rights[1].add(sums[m], p[1]);
        }
    }

    // Whether no sum has left its range.
    __device__ bool in_range() const {
        bool good = true;
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) good &= fabsf(sums[i / 4][i % 4]) < LIMIT;
        return __all_sync(ALL, good);
    }
};

template <int D, int OWN, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const Heads shape) {
    constexpr int CHUNK = BLOCK * OWN;
    // Components of k, of v, and ones.
    __shared__ Plane tiles[WARPS][2 * D + 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Plane *planes = tiles[warp];
    planes[2 * D].at[lane] = 1.0f;
    const uint32_t keys_at = planes[lane % D].left();
    // The columns from D on sum up p; one of them is of use.
    const uint32_t values_at = planes[D + min(lane / 4, D)].right();
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        // The longest rows first; neighbours share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), key_row = shape.key_row(head);
        Forward<D, OWN> rows;
        rows.load_rows(q + row * D, first_key + shape.window(head) * shape.context, first,
                       shape.context);
        int begin, masked;
        rows.seen(begin, masked);
        begin = begin / TILE * TILE;
        const int end = min(first + CHUNK, shape.context);

        bool careful = false;
        do {
            rows.clear();
            Keys<T, D> keys{rows_at<Row<D>>(k + key_row * D), rows_at<Row<D>>(v + key_row * D),
                            shape.context - 1, planes};
            keys.fetch(begin);
            // A row has no shift before the tile of its first key is through.
            const int first_clear = careful ? end : masked + 1, last_clear = first + 1 - TILE;
            for (int tile = begin;; tile += TILE) {
                for (; first_clear <= tile && tile <= last_clear; tile += TILE) {
                    keys.next(tile);
                    rows.add(keys_at, values_at);
                }
                if (tile >= end) break;
                keys.next(tile);
                rows.add_with_care(keys_at, values_at, tile);
            }
            if (careful) break;
            careful = !rows.in_range();
        } while (careful);

#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = rows.column(m, half);
                float sum = rows.sum[m][half];
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                // What p as `out` has it sums up to.
                const float weight =
                    __shfl_sync(ALL, rows.sums[m][2 * half], lane / 4 * 4 + D / 2);
                if (column >= shape.context) continue;
                const bool any = weight > 0.0f;
                if (lane % 4 == D / 2) {
                    lse[row + column] = any ? (log2f(sum) - rows.start[m][2 * half]) * LN2 : 0.0f;
                }
                if (lane % 4 >= D / 2) continue;
                const float inverse = any ? 1.0f / weight : 0.0f;
                const float values[2] = {rows.sums[m][2 * half] * inverse,
                                         rows.sums[m][2 * half + 1] * inverse};
                store(out + shape.token_row(head, column) * D + lane % 4 * 2, values);
            }
        }
    }
}

template <int D, int OWN>
struct BackwardQ : Queries<D, OWN> {
    Left<OWN, 1> dout;
    Product lse[OWN], delta[OWN], dq[OWN];

    template <bool MASKED>
    __device__ void add(uint32_t keys_at, uint32_t values_at, uint32_t right_at, int tile) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float keys[2], values[2];
            load_shared(keys, keys_at + 4 * i);
            load_shared(values, values_at + 4 * i);
            const Right right(right_at + 4 * i);
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                if (MASKED && this->first + BLOCK * m + BLOCK <= tile) continue;
                Product ds[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    Product p;
                    this->q.dot(p, m, keys[j], lse[m]);
                    if (MASKED) this->mask(p, m, tile, i + j);
                    dout.dot(ds[j], m, values[j], delta[m]);
#pragma unroll
                    for (int e = 0; e < 4; e++) ds[j][e] *= exp2_approx(p[e]);
                }
                right.add(dq[m], ds);
            }
        }
    }
};

template <int D, int OWN, typename T>
__device__ void backward_q(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const Heads shape) {
    constexpr int CHUNK = BLOCK * OWN;
    // Components of k, of v, and ones, for the slots that v leaves.
    __shared__ Plane tiles[WARPS][D + 4];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Plane *planes = tiles[warp];
    for (int i = D; i < 4; i++) planes[D + i].at[lane] = 1.0f;
    const uint32_t keys_at = planes[lane % D].left(), values_at = planes[D + lane % 4].left();
    // The columns from D on are of no use.
    const uint32_t right_at = planes[lane / 4 % D].right();
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), key_row = shape.key_row(head);
        BackwardQ<D, OWN> rows;
        rows.load_rows(q + row * D, first_key + shape.window(head) * shape.context, first,
                       shape.context);
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = rows.column(m, half);
                const bool there = column < shape.context;
                const size_t at = shape.token_row(head, column) * D + lane % D;
                const float less = there ? -delta[row + column] : 0.0f;
                rows.dout.template whole<D>(m, half, there ? widen(dout[at]) : 0.0f, less);
                set(rows.lse[m], half, there ? -lse[row + column] * LOG2E : 0.0f);
                // At head_dim 2 it had room in the slots.
                if constexpr (D == 4) {
                    set(rows.delta[m], half, less);
                } else {
                    rows.delta[m][2 * half] = rows.delta[m][2 * half + 1] = 0.0f;
                }
                rows.dq[m][2 * half] = rows.dq[m][2 * half + 1] = 0.0f;
            }
        }
        int begin, masked;
        rows.seen(begin, masked);
        begin = begin / TILE * TILE;
        const int end = min(first + CHUNK, shape.context);

        Keys<T, D> keys{rows_at<Row<D>>(k + key_row * D), rows_at<Row<D>>(v + key_row * D),
                        shape.context - 1, planes};
        keys.fetch(begin);
        const int last_clear = first + 1 - TILE;
        for (int tile = begin;; tile += TILE) {
            for (; masked <= tile && tile <= last_clear; tile += TILE) {
                keys.next(tile);
                rows.template add<false>(keys_at, values_at, right_at, tile);
            }
            if (tile >= end) break;
            keys.next(tile);
            rows.template add<true>(keys_at, values_at, right_at, tile);
        }
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = rows.column(m, half);
                if (column >= shape.context || lane % 4 >= D / 2) continue;
                const float *pair = rows.dq[m] + 2 * half;
                const float values[2] = {pair[0] * (root<D>() * REGAIN),
                                         pair[1] * (root<D>() * REGAIN)};
                store(dq + (row + column) * D + lane % 4 * 2, values);
            }
        }
    }
}

// Queries of a head, tile by tile, and what the way back needs of them beside q and dout. Behind
// the last comes the last once more.
template <typename T, int D>
struct Stream {
    struct Tile {
        // Components of q, of dout, and zeros.
        Plane planes[2 * D + 1];
        Starts lse, delta;
        int from[TILE];
    };
    const Row<D> *q, *dout;
    const float *lse, *delta;
    // Query heads: neighbours of dout are so many rows apart.
    int heads, last;
    Tile &tile;
    Row<D> next_q, next_dout;
    float next_lse, next_delta;

    __device__ void fetch(int first) {
        const int column = min(first + static_cast<int>(threadIdx.x % WARP), last);
        next_q = __ldg(q + column), next_dout = __ldg(dout + column * heads);
        next_lse = __ldg(lse + column), next_delta = __ldg(delta + column);
    }
    // Puts the tile that was fetched, and fetches the next.
    __device__ void next(int first) {
        const int lane = threadIdx.x % WARP;
        __syncwarp();
        put<T>(tile.planes, next_q);
        put<T>(tile.planes + D, next_dout);
        tile.lse.put(lane, -LOG2E * next_lse);
        tile.delta.put(lane, next_delta);
        __syncwarp();
        fetch(first + TILE);
    }
};

// The keys of a warp: `first` and those behind it.
template <int D, int OWN>
struct BackwardKV {
    Left<OWN, D / 2> k;
    Left<OWN, 1> v;
    // dv in the columns from 0 on, dk in those from D on.
    Product sums[OWN];
    int first, lane;
    // Where this lane finds, in a tile, q (and D planes behind it dout) for the first products,
    // dout and q for the second ones, and what the first ones begin with.
    uint32_t left_at, dout_at, q_at, starts_at;

    __device__ int column(int block, int half) const {
        return first + BLOCK * block + 8 * half + lane / 4;
    }

    template <bool MASKED, typename Tile>
    __device__ void add(const Tile &tile, int first_query) {
#pragma unroll 1
        for (int i = 0; i < 4; i += 2) {
            float queries[2], douts[2];
            load_shared(queries, left_at + 4 * i);
            load_shared(douts, left_at + 4 * i + D * sizeof(Plane));
            const Right dout(dout_at + 4 * i), q(q_at + 4 * i);
            Product lse[2], delta[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load_shared(lse[j], starts_at + (i + j) * 64);
                load_shared(delta[j], starts_at + (i + j) * 64 + sizeof(Starts));
            }
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                if (MASKED && first_query + TILE <= first + BLOCK * m) continue;
                Product p[2], ds[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    k.dot(p[j], m, queries[j], lse[j]);
                    v.dot(ds[j], m, douts[j], delta[j]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int at = tile_row(i + j, e % 2), key = column(m, e / 2);
                        p[j][e] = exp2_approx(p[j][e]);
                        if (MASKED && (key < tile.from[at] || first_query + at < key)) {
                            p[j][e] = 0.0f;
                        }
                        ds[j][e] *= p[j][e];
                    }
                }
                dout.add(sums[m], p);
                q.add(sums[m], ds);
            }
        }
    }
};

// Warps of a block.
__host__ __device__ constexpr int most_warps(int own) { return own == 1 ? 8 : 4; }

// A block takes one run of keys; its warps share out the query heads, and are added in their order.
template <int D, int OWN, typename T>
__device__ void backward_kv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const Heads shape) {
    constexpr int CHUNK = BLOCK * OWN;
    __shared__ typename Stream<T, D>::Tile tiles[most_warps(OWN)];
    // dv and dk.
    __shared__ float sums[CHUNK][2 * D];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    typename Stream<T, D>::Tile &tile = tiles[warp];
    tile.planes[2 * D].at[lane] = 0.0f;
    const int chunks = (shape.context + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.windows * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        const int kv_head = task % kv_heads, first = task / kv_heads * CHUNK;
        const int behind = min(first + CHUNK, shape.context);
        const size_t key_row = static_cast<size_t>(kv_head) * shape.context;
        BackwardKV<D, OWN> rows;
        rows.first = first, rows.lane = lane;
        rows.left_at = tile.planes[lane % D].left();
        rows.dout_at = tile.planes[lane / 4 < D ? D + lane / 4 : 2 * D].right();
        rows.q_at = tile.planes[lane / 4 / D == 1 ? lane / 4 - D : 2 * D].right();
        rows.starts_at = shared_address(tile.lse.at[0][lane % 4]);
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = rows.column(m, half);
                const size_t at = (key_row + column) * D + lane % D;
                const bool there = column < shape.context;
                rows.k.template split<D>(m, half,
                                         there ? widen(k[at]) * (root<D>() * LOG2E) : 0.0f);
                rows.v.template whole<D>(m, half, there ? -widen(v[at]) : 0.0f, 0.0f);
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) rows.sums[m][e] = 0.0f;
            }
        }
        // Queries from `clear` on may not see all of these keys; from `end` on none sees any.
        const uint32_t *firsts = first_key + shape.window(kv_head * shape.group()) * shape.context;
        int clear = shape.context, end = first;
        for (int column = first + lane; column < shape.context; column += WARP) {
            const int seen = first_seen(firsts, column);
            if (seen > first) clear = min(clear, column);
            if (seen < behind) end = max(end, column + 1);
        }
        clear = __reduce_min_sync(ALL, clear);
        end = __reduce_max_sync(ALL, end);
        const int first_clear = first + CHUNK - 1, last_clear = min(clear, end) - TILE;

        for (int shared = warp; shared < shape.group(); shared += warps) {
            const int head = kv_head * shape.group() + shared;
            const size_t row = shape.row(head, 0);
            Stream<T, D> stream{rows_at<Row<D>>(q + row * D),
                                rows_at<Row<D>>(dout + shape.token_row(head, 0) * D),
                                rows_at<float>(lse + row), rows_at<float>(delta + row),
                                shape.heads, shape.context - 1, tile};
            stream.fetch(first);
            for (int at = first;; at += TILE) {
                for (; first_clear <= at && at <= last_clear; at += TILE) {
                    stream.next(at);
                    rows.template add<false>(tile, at);
                }
                if (at >= end) break;
                const int column = at + lane;
                __syncwarp();
                // A query past the last sees nothing.
                tile.from[lane] = column < shape.context ? first_seen(firsts, column) : INT_MAX;
                stream.next(at);
                rows.template add<true>(tile, at);
            }
        }
        for (int turn = 0; turn < warps; turn++) {
            if (turn == warp && lane % 4 < D) {
#pragma unroll
                for (int i = 0; i < 4 * OWN; i++) {
                    const int own = rows.column(i / 4, i % 4 / 2) - first;
                    float &sum = sums[own][lane % 4 * 2 + i % 2];
                    sum = rows.sums[i / 4][i % 4] + (turn == 0 ? 0.0f : sum);
                }
            }
            __syncthreads();
        }
        for (int own = threadIdx.x; first + own < behind; own += blockDim.x) {
            float key[D], value[D];
#pragma unroll
            for (int c = 0; c < D; c++) {
                value[c] = sums[own][c] * REGAIN;
                key[c] = sums[own][D + c] * (-root<D>() * REGAIN);
            }
            store(dk + (key_row + first + own) * D, key);
            store(dv + (key_row + first + own) * D, value);
        }
        // The next task's sums must not overwrite what a slower warp still reads.
        __syncthreads();
    }
}

// Blocks of 128 threads that are to find registers on one multiprocessor.
constexpr int blocks(int head_dim, int own) {
    return own == 1 ? 4 : head_dim == 2 && own == 4 ? 3 : 2;
}

// Entries are named for head_dim and blocks of 16 rows a warp: several make the most of a tile, one
// makes the most warps where there are few rows in all. Launch of forward and back to q: blocks of
// 128 threads, a grid along x of any size; a warp for every 16 OWN rows of a head is best. Of back
// to k and v: blocks of one to four warps, of one block of rows a warp to eight, best as many as
// query heads share a key/value head; a block for every 16 OWN rows of a key/value head.

#define FORWARD(D, OWN, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(128, blocks(D, OWN))                              \
    attention_smallhead_tf32_##D##_##OWN##_##T(                                                        \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int windows, int context, int heads, int kv_heads) {                                       \
        forward<D, OWN>(q, k, v, first_key, out, lse, {windows, context, heads, kv_heads, D});     \
    }

#define BACKWARD_Q(D, OWN, T)                                                                      \
    extern "C" __global__ void __launch_bounds__(128, blocks(D, OWN))                              \
    attention_smallhead_tf32_backward_dq_##D##_##OWN##_##T(                                             \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int windows, int context, int heads, int kv_heads) {                                       \
        backward_q<D, OWN>(q, k, v, first_key, lse, delta, dout, dq,                               \
                           {windows, context, heads, kv_heads, D});                                \
    }

#define BACKWARD_KV(D, OWN, T)                                                                     \
    extern "C" __global__ void                                                                     \
    __launch_bounds__(32 * most_warps(OWN), blocks(D, OWN) * 4 / most_warps(OWN))                  \
    attention_smallhead_tf32_backward_dkdv_##D##_##OWN##_##T(                                            \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int windows, int context, int heads, int kv_heads) {                   \
        backward_kv<D, OWN>(q, k, v, first_key, lse, delta, dout, dk, dv,                          \
                            {windows, context, heads, kv_heads, D});                               \
    }

#define ENTRIES(T)                                                                                 \
    FORWARD(2, 4, T)                                                                               \
    FORWARD(4, 4, T)                                                                               \
    FORWARD(2, 1, T)                                                                               \
    FORWARD(4, 1, T)                                                                               \
    BACKWARD_Q(2, 4, T)                                                                            \
    BACKWARD_Q(4, 4, T)                                                                            \
    BACKWARD_Q(2, 1, T)                                                                            \
    BACKWARD_Q(4, 1, T)                                                                            \
    BACKWARD_KV(2, 8, T)                                                                           \
    BACKWARD_KV(4, 4, T)                                                                           \
    BACKWARD_KV(2, 1, T)                                                                           \
    BACKWARD_KV(4, 1, T)

ENTRIES(bf16)
ENTRIES(f16)

