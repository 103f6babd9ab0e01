// Checks what paged attention is given before a kernel follows any index, and registers it.
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include <nanobind/stl/array.h>

#include "../bindings.h"
#include "attention.h"

namespace minivllm {

static std::string at(const char* name, int64_t index, int64_t value) {
    return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

static void check_request(const Attention& a, int64_t b, int64_t num_tokens, int64_t num_blocks, int64_t max_blocks) {
    const int64_t begin = a.query_start_loc[b], end = a.query_start_loc[b + 1], seq_len = a.seq_lens[b];
    if (begin > end || end > num_tokens)
        throw std::out_of_range(at("query_start_loc", b + 1, end) + " is below its predecessor or above the " +
                                std::to_string(num_tokens) + " query rows");
    if (seq_len < end - begin || seq_len > max_blocks * a.block_size)
        throw std::out_of_range(at("seq_lens", b, seq_len) + " is below the request's " + std::to_string(end - begin) +
                                " query rows or above the " + std::to_string(max_blocks) + " blocks of its table");
    for (int64_t i = 0; i * a.block_size < seq_len; ++i) {
        const int64_t block = a.block_table[b * a.block_table_stride + i];
        if (block < 0 || block >= num_blocks)
            throw std::out_of_range("request " + std::to_string(b) + ": " + at("block_table", i, block) +
                                    " lies outside the cache of " + std::to_string(num_blocks) + " blocks");
    }
}

static void paged_attention(uintptr_t out, uintptr_t q, uintptr_t kv_cache, uintptr_t block_table, uintptr_t seq_lens,
                            uintptr_t query_start_loc, int dtype, std::array<int64_t, 3> q_shape,
                            std::array<int64_t, 2> q_strides, std::array<int64_t, 3> cache_shape,
                            std::array<int64_t, 2> table_shape, int64_t block_table_stride, float scale,
                            int64_t sliding_window) {
    const auto [num_tokens, num_heads, head_dim] = q_shape;
    const auto [num_blocks, num_kv_heads, block_size] = cache_shape;
    const auto [num_reqs, max_blocks] = table_shape;
    if (head_dim % kHeadDimStep != 0)
        throw std::invalid_argument("head_dim " + std::to_string(head_dim) + " is not a multiple of 16");
    if (block_size % kKvTile != 0)
        throw std::invalid_argument("block size " + std::to_string(block_size) + " is not a multiple of 32");
    if (num_heads % num_kv_heads != 0)
        throw std::invalid_argument(std::to_string(num_heads) + " query heads cannot share " +
                                    std::to_string(num_kv_heads) + " key-value heads evenly");
    const Attention a{ptr<void>(out),
                      ptr<const void>(q),
                      ptr<const void>(kv_cache),
                      ptr<const int32_t>(block_table),
                      ptr<const int32_t>(seq_lens),
                      ptr<const int32_t>(query_start_loc),
                      DType(dtype),
                      num_heads,
                      head_dim,
                      q_strides[0],
                      q_strides[1],
                      num_kv_heads,
                      block_size,
                      num_reqs,
                      block_table_stride,
                      scale,
                      sliding_window > 0 ? sliding_window : std::numeric_limits<int64_t>::max()};
    if (a.query_start_loc[0] < 0) throw std::out_of_range(at("query_start_loc", 0, a.query_start_loc[0]) + " is negative");
    for (int64_t b = 0; b < num_reqs; ++b) check_request(a, b, num_tokens, num_blocks, max_blocks);
    const int64_t row_bytes = num_heads * head_dim * size_of(a.dtype);
    const int64_t begin = a.query_start_loc[0], end = a.query_start_loc[num_reqs];  // rows of no request are zero
    std::memset(a.out, 0, size_t(begin * row_bytes));
    std::memset(static_cast<char*>(a.out) + end * row_bytes, 0, size_t((num_tokens - end) * row_bytes));
    attention_kernels().run(a);
}

MINIVLLM_BIND(paged_attention, m) { m.def("paged_attention", &paged_attention, release_gil); }

}  // namespace minivllm
