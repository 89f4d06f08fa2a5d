// Training windows gathered on the device from the resident token file: ids, targets and first
// visible keys as `src/tokens/windows.rs` defines them, for each kind of window.
//
// tokens: ids of the file, u16 or u32; ids, targets, first_key: [batch, seq_len] in u32. Sequence b
// is window order[*cursor + b]; both are read from device memory, so that one captured graph serves
// every step. pad: id of padding. Bytes: 16 to 18 per position. No FLOPs: bound by memory and
// launch latency.
//
// Launch: blocks of 256 threads along x; a grid of (ceil(seq_len / 256), any number).
#include "lib/constants.cuh"
#include <cstdint>

struct Batch {
    const unsigned *order, *cursor;
    unsigned *ids, *targets, *first_key;
    int batch, seq_len;
    unsigned pad;
};

struct Position {
    unsigned id, target, first_key;
};

// `read(window, position, out)` fills in a position unless it is padding.
template <typename Read>
__device__ void gather(const Batch &batch, Read read) {
    const unsigned begin = *batch.cursor;  // mutant: cursor_ignored
    const int position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= batch.seq_len) return;
    for (int b = blockIdx.y; b < batch.batch; b += gridDim.y) {
        Position out = {batch.pad, IGNORE_INDEX, static_cast<unsigned>(batch.seq_len)};
        read(batch.order[begin + b], position, out);
        const size_t at = static_cast<size_t>(b) * batch.seq_len + position;
        batch.ids[at] = out.id;
        batch.targets[at] = out.target;
        batch.first_key[at] = out.first_key;
    }
}

// Windows of the original LaaM: `lengths[window]` tokens from `starts[window]` on, padded on the
// left.
template <typename Id>
__device__ void original(const Id *tokens, const uint64_t *starts, const unsigned *lengths,
                         const Batch &batch) {
    gather(batch, [&](unsigned window, int position, Position &out) {
        const int padding = batch.seq_len - lengths[window];
        if (position < padding) return;
        const Id *token = tokens + starts[window] + (position - padding);
        out.id = token[0];
        // The last position has no next token in its window.
        // mutant: last_position_has_target
        if (position + 1 < batch.seq_len) out.target = token[1];
        out.first_key = padding;
    });
}

// All documents concatenated, a window every `stride` of the `count` tokens; a token sees only its
// own document. documents: start of each, ascending, the first at 0: [document_count].
template <typename Id>
__device__ void stream(const Id *tokens, uint64_t count, const uint64_t *documents,
                       int document_count, int stride, const Batch &batch) {
    gather(batch, [&](unsigned window, int position, Position &out) {
        const uint64_t start = static_cast<uint64_t>(window) * stride, at = start + position;
        if (at >= count) return;
        out.id = tokens[at];
        if (at + 1 < count) out.target = tokens[at + 1];
        // Binary search for the last document that begins at or before this token.
        int from = 0, to = document_count;
        while (to - from > 1) {
            const int middle = from + (to - from) / 2;
            if (documents[middle] <= at) from = middle; else to = middle;
        }
        const uint64_t begin = documents[from];
        // mutant: earlier_document_visible
        out.first_key = begin > start ? static_cast<unsigned>(begin - start) : 0;
    });
}

// A chunk of a document after its address. addresses: those of all windows concatenated, window w's
// from address_starts[w] to address_starts[w + 1]; the chunk is the `lengths[w]` tokens from
// `starts[w]` on. Every token of the chunk is predicted, the last one even if it has no position of
// its own.
template <typename Id>
__device__ void addressed(const Id *tokens, const uint64_t *starts, const unsigned *lengths,
                          const unsigned *addresses, const unsigned *address_starts,
                          const Batch &batch) {
    gather(batch, [&](unsigned window, int position, Position &out) {
        const unsigned *address = addresses + address_starts[window];
        const int prefix = address_starts[window + 1] - address_starts[window];
        const int length = prefix + lengths[window];
        const Id *chunk = tokens + starts[window];
        if (position >= length) return;
        out.id = position < prefix ? address[position] : chunk[position - prefix];
        if (position + 1 >= prefix && position + 1 < length) {  // mutant: last_target_dropped
            out.target = chunk[position + 1 - prefix];
        }
        out.first_key = 0;
    });
}

#define ENTRIES(NAME, ID)                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    gather_windows_original_##NAME(                                                                \
        const ID *__restrict__ tokens, const uint64_t *__restrict__ starts,                        \
        const unsigned *__restrict__ lengths, const unsigned *__restrict__ order,                  \
        const unsigned *__restrict__ cursor, unsigned *__restrict__ ids,                           \
        unsigned *__restrict__ targets, unsigned *__restrict__ first_key, int batch, int seq_len,  \
        unsigned pad) {                                                                            \
        original(tokens, starts, lengths,                                                          \
                 {order, cursor, ids, targets, first_key, batch, seq_len, pad});                   \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    gather_windows_stream_##NAME(                                                                  \
        const ID *__restrict__ tokens, uint64_t count, const uint64_t *__restrict__ documents,     \
        int document_count, int stride, const unsigned *__restrict__ order,                        \
        const unsigned *__restrict__ cursor, unsigned *__restrict__ ids,                           \
        unsigned *__restrict__ targets, unsigned *__restrict__ first_key, int batch, int seq_len,  \
        unsigned pad) {                                                                            \
        stream(tokens, count, documents, document_count, stride,                                   \
               {order, cursor, ids, targets, first_key, batch, seq_len, pad});                     \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    gather_windows_addressed_##NAME(                                                               \
        const ID *__restrict__ tokens, const uint64_t *__restrict__ starts,                        \
        const unsigned *__restrict__ lengths, const unsigned *__restrict__ addresses,              \
        const unsigned *__restrict__ address_starts, const unsigned *__restrict__ order,           \
        const unsigned *__restrict__ cursor, unsigned *__restrict__ ids,                           \
        unsigned *__restrict__ targets, unsigned *__restrict__ first_key, int batch, int seq_len,  \
        unsigned pad) {                                                                            \
        addressed(tokens, starts, lengths, addresses, address_starts,                              \
                  {order, cursor, ids, targets, first_key, batch, seq_len, pad});                  \
    }

ENTRIES(u16, uint16_t)
ENTRIES(u32, uint32_t)
