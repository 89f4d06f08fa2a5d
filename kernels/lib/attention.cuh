// Layouts and masking shared by the attention kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

// As in `src/llama/ops.rs`. `head` counts the query heads of the whole batch: grouped-query
// attention (GQA) shares a key/value head among `group()` of them.
struct AttentionShape {
    int batch, seq_len, heads, kv_heads, head_dim;

    __device__ int group() const { return heads / kv_heads; }
    __device__ size_t sequence(int head) const { return head / heads; }
    // Row in q: [batch, heads, seq_len].
    __device__ size_t row(int head, int position) const {
        return static_cast<size_t>(head) * seq_len + position;
    }
    // First row in k and v of the key/value head that a query head reads: [batch, kv_heads,
    // seq_len].
    __device__ size_t kv_row(int head) const {
        return static_cast<size_t>(head / group()) * seq_len;
    }
    // Row in out: [batch, seq_len, heads].
    __device__ size_t out_row(int head, int position) const {
        return (sequence(head) * seq_len + position) * heads + head % heads;
    }
};

// First key position visible to the query at `position`; position + 1 if it sees no key.
__device__ inline int first_visible(const uint32_t *first_key, int position) {
    return static_cast<int>(min(first_key[position], static_cast<uint32_t>(position) + 1));
}
