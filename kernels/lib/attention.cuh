// What the attention kernels have in common: where rows lie, and what a row sees.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

// `src/llama/ops.rs` names it alike. `head` counts the query heads of all windows.
struct Heads {
    int windows, context, heads, kv_heads, head_dim;

    __device__ int group() const { return heads / kv_heads; }
    __device__ size_t window(int head) const { return head / heads; }
    // In q: [windows, heads, context].
    __device__ size_t row(int head, int column) const {
        return static_cast<size_t>(head) * context + column;
    }
    // The first row of the key/value head that a query head reads, in k: [windows, kv_heads, context].
    __device__ size_t key_row(int head) const {
        return static_cast<size_t>(head / group()) * context;
    }
    // In out: [windows, context, heads].
    __device__ size_t token_row(int head, int column) const {
        return (window(head) * context + column) * heads + head % heads;
    }
};

// The first column that a row of a window sees; one past the row itself where it sees none.
__device__ inline int first_seen(const uint32_t *first_key, int column) {
    return static_cast<int>(min(first_key[column], static_cast<uint32_t>(column) + 1));
}
