// Windows drawn on the device from the token file there: ids, targets and first keys as
// `src/tokens/windows.rs` defines them, for each of its kinds.
//
// tokens: the file's ids, u16 or u32; ids, targets, first_key: [windows, context] in u32.
// Which windows: the numbers order[*cursor + w] for w in 0..windows, so that a captured graph serves
// every step; `cursor` may be null: 0, and `order`: the numbers as they come. The number 0xffffffff
// is no window: all padding, no target, for the rows that a short batch leaves over. pad: the id of
// padding.
// Bytes: 16 to 18 a column. No FLOPs: bound by memory, and by its launch.
//
// Launch: blocks of 256 threads along x, ceil(context / 256) by any number of them along y.
#include <cstdint>

constexpr unsigned IGNORE = 0xffffffffu, NO_WINDOW = 0xffffffffu;

struct Batch {
    const unsigned *order, *cursor;
    unsigned *ids, *targets, *first_key;
    int windows, context;
    unsigned pad;
};

struct Column {
    unsigned id, target, first_key;
};

// `find(number, column, found)` says what stands in a column, where that is no padding.
template <typename Find>
__device__ void gather(const Batch &batch, Find find) {
    const unsigned begin = batch.cursor != nullptr ? *batch.cursor : 0;
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= batch.context) return;
    for (int w = blockIdx.y; w < batch.windows; w += gridDim.y) {
        const unsigned number = batch.order != nullptr ? batch.order[begin + w] : begin + w;
        Column found = {batch.pad, IGNORE, static_cast<unsigned>(batch.context)};
        if (number != NO_WINDOW) find(number, column, found);
        const size_t at = static_cast<size_t>(w) * batch.context + column;
        batch.ids[at] = found.id;
        batch.targets[at] = found.target;
        batch.first_key[at] = found.first_key;
    }
}

// The first LaaM's windows: window `number` is the `lengths[number]` tokens from `starts[number]`
// on, padded on the left.
template <typename Id>
__device__ void original(const Id *tokens, const uint64_t *starts, const unsigned *lengths,
                         const Batch &batch) {
    gather(batch, [&](unsigned number, int column, Column &found) {
        const int pads = batch.context - lengths[number];
        if (column < pads) return;
        const Id *token = tokens + starts[number] + (column - pads);
        found.id = token[0];
        // The first real token has no real one before it, and the last column no next one.
        if (column + 1 < batch.context) found.target = token[1];
        found.first_key = pads;
    });
}

// All documents in a row, a window every `stride` of the `count` tokens; a token sees its own
// document only. documents: where each begins, ascending, the first at 0: [document_count].
template <typename Id>
__device__ void stream(const Id *tokens, uint64_t count, const uint64_t *documents,
                       int document_count, int stride, const Batch &batch) {
    gather(batch, [&](unsigned number, int column, Column &found) {
        const uint64_t start = static_cast<uint64_t>(number) * stride, at = start + column;
        if (at >= count) return;
        found.id = tokens[at];
        if (at + 1 < count) found.target = tokens[at + 1];
        // The last document that begins at or before this token.
        int from = 0, to = document_count;
        while (to - from > 1) {
            const int middle = from + (to - from) / 2;
            if (documents[middle] <= at) from = middle; else to = middle;
        }
        const uint64_t begin = documents[from];
        found.first_key = begin > start ? static_cast<unsigned>(begin - start) : 0;
    });
}

// A stretch of a document behind its address. addresses: those of all windows in a row, that of
// window `number` between address_starts[number] and address_starts[number + 1]; the stretch is
// the `lengths[number]` tokens from `starts[number]` on. All of it is predicted, its last token even
// where it has no column of its own.
template <typename Id>
__device__ void addressed(const Id *tokens, const uint64_t *starts, const unsigned *lengths,
                          const unsigned *addresses, const unsigned *address_starts,
                          const Batch &batch) {
    gather(batch, [&](unsigned number, int column, Column &found) {
        const unsigned *address = addresses + address_starts[number];
        const int prefix = address_starts[number + 1] - address_starts[number];
        const int real = prefix + lengths[number];
        const Id *stretch = tokens + starts[number];
        if (column >= real) return;
        found.id = column < prefix ? address[column] : stretch[column - prefix];
        if (column + 1 >= prefix && column + 1 < real) found.target = stretch[column + 1 - prefix];
        found.first_key = 0;
    });
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_original_u16(const uint16_t *__restrict__ tokens, const uint64_t *__restrict__ starts,
                    const unsigned *__restrict__ lengths, const unsigned *__restrict__ order,
                    const unsigned *__restrict__ cursor, unsigned *__restrict__ ids,
                    unsigned *__restrict__ targets, unsigned *__restrict__ first_key, int windows,
                    int context, unsigned pad) {
    original(tokens, starts, lengths,
             {order, cursor, ids, targets, first_key, windows, context, pad});
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_stream_u16(const uint16_t *__restrict__ tokens, uint64_t count,
                  const uint64_t *__restrict__ documents, int document_count, int stride,
                  const unsigned *__restrict__ order, const unsigned *__restrict__ cursor,
                  unsigned *__restrict__ ids, unsigned *__restrict__ targets,
                  unsigned *__restrict__ first_key, int windows, int context, unsigned pad) {
    stream(tokens, count, documents, document_count, stride,
           {order, cursor, ids, targets, first_key, windows, context, pad});
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_addressed_u16(const uint16_t *__restrict__ tokens, const uint64_t *__restrict__ starts,
                     const unsigned *__restrict__ lengths, const unsigned *__restrict__ addresses,
                     const unsigned *__restrict__ address_starts,
                     const unsigned *__restrict__ order, const unsigned *__restrict__ cursor,
                     unsigned *__restrict__ ids, unsigned *__restrict__ targets,
                     unsigned *__restrict__ first_key, int windows, int context, unsigned pad) {
    addressed(tokens, starts, lengths, addresses, address_starts,
              {order, cursor, ids, targets, first_key, windows, context, pad});
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_original_u32(const uint32_t *__restrict__ tokens, const uint64_t *__restrict__ starts,
                    const unsigned *__restrict__ lengths, const unsigned *__restrict__ order,
                    const unsigned *__restrict__ cursor, unsigned *__restrict__ ids,
                    unsigned *__restrict__ targets, unsigned *__restrict__ first_key, int windows,
                    int context, unsigned pad) {
    original(tokens, starts, lengths,
             {order, cursor, ids, targets, first_key, windows, context, pad});
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_stream_u32(const uint32_t *__restrict__ tokens, uint64_t count,
                  const uint64_t *__restrict__ documents, int document_count, int stride,
                  const unsigned *__restrict__ order, const unsigned *__restrict__ cursor,
                  unsigned *__restrict__ ids, unsigned *__restrict__ targets,
                  unsigned *__restrict__ first_key, int windows, int context, unsigned pad) {
    stream(tokens, count, documents, document_count, stride,
           {order, cursor, ids, targets, first_key, windows, context, pad});
}

extern "C" __global__ void __launch_bounds__(256)
gather_windows_addressed_u32(const uint32_t *__restrict__ tokens, const uint64_t *__restrict__ starts,
                     const unsigned *__restrict__ lengths, const unsigned *__restrict__ addresses,
                     const unsigned *__restrict__ address_starts,
                     const unsigned *__restrict__ order, const unsigned *__restrict__ cursor,
                     unsigned *__restrict__ ids, unsigned *__restrict__ targets,
                     unsigned *__restrict__ first_key, int windows, int context, unsigned pad) {
    addressed(tokens, starts, lengths, addresses, address_starts,
              {order, cursor, ids, targets, first_key, windows, context, pad});
}
