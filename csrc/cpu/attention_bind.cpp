// Checks what paged attention is given before a kernel follows any index, and registers it.
#include <array>
#include <cstring>
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
    const int64_t block_size = a.layout.block_size;
    if (seq_len < end - begin || seq_len > max_blocks * block_size)
        throw std::out_of_range(at("seq_lens", b, seq_len) + " is below the request's " + std::to_string(end - begin) +
                                " query rows or above the " + std::to_string(max_blocks) + " blocks of its table");
    for (int64_t i = 0; i * block_size < seq_len; ++i) {
        const int64_t block = a.block_table[b * a.block_table_stride + i];
        if (block < 0 || block >= num_blocks)
            throw std::out_of_range("request " + std::to_string(b) + ": " + at("block_table", i, block) +
                                    " lies outside the cache of " + std::to_string(num_blocks) + " blocks");
    }
}

static void check_group(const Attention& a, int64_t g) {
    const int64_t begin = a.group_starts[g], end = a.group_starts[g + 1], len = a.shared_lens[g];
    if (begin < 0 || begin > end || end > a.num_members)
        throw std::out_of_range(at("group_starts", g + 1, end) + " is below its predecessor or above the " +
                                std::to_string(a.num_members) + " members");
    if (len <= 0 || len % kStep != 0)
        throw std::invalid_argument(at("shared_lens", g, len) + " is not a positive multiple of " +
                                    std::to_string(kStep));
    for (int64_t m = begin; m < end; ++m) {
        const int64_t b = a.members[m];
        if (b < 0 || b >= a.num_reqs) throw std::out_of_range(at("members", m, b) + " is no request of the batch");
        if (a.query_start_loc[b + 1] - a.query_start_loc[b] != 1 || a.seq_lens[b] < len)
            throw std::invalid_argument(at("members", m, b) + " has not one query row behind the shared " +
                                        std::to_string(len) + " tokens");
    }
}

// seq: block_table, seq_lens, query_start_loc; groups: members, group_starts, shared_lens (0 where there are none);
// extras: sinks, alibi (0 where there are none); write: where a step that leaves its keys and values to attention has
// them, [num_tokens, 2 × KV heads, head_dim], and their slots (0 where none does).
static void paged_attention(uintptr_t out, uintptr_t q, uintptr_t kv_cache, std::array<uintptr_t, 3> seq, int dtype,
                            int kv_type, std::array<int64_t, 3> q_shape, std::array<int64_t, 2> q_strides,
                            std::array<int64_t, 3> cache_shape, std::array<int64_t, 2> table_shape,
                            int64_t block_table_stride, std::array<float, 3> scales, int64_t sliding_window,
                            float softcap, std::array<uintptr_t, 2> extras, std::array<uintptr_t, 3> groups,
                            std::array<int64_t, 2> group_sizes, std::array<uintptr_t, 2> write) {
    const auto [num_tokens, num_heads, head_dim] = q_shape;
    const auto [num_blocks, num_kv_heads, block_size] = cache_shape;
    const auto [num_reqs, max_blocks] = table_shape;
    if (head_dim % kHeadDimStep != 0)
        throw std::invalid_argument("head_dim " + std::to_string(head_dim) + " is not a multiple of 16");
    if (block_size % kKvTile != 0)
        throw std::invalid_argument("block size " + std::to_string(block_size) + " is not a multiple of 32");
    if (num_heads % num_kv_heads != 0 || num_heads / num_kv_heads > 64)
        throw std::invalid_argument(std::to_string(num_heads) + " query heads cannot share " +
                                    std::to_string(num_kv_heads) + " key-value heads evenly, at most 64 each");
    Attention a{};
    a.out = ptr<void>(out);
    a.q = ptr<const void>(q);
    a.kv_cache = ptr<const char>(kv_cache);
    a.layout = {KvType(kv_type), num_kv_heads, head_dim, block_size};
    a.block_table = ptr<const int32_t>(seq[0]);
    a.seq_lens = ptr<const int32_t>(seq[1]);
    a.query_start_loc = ptr<const int32_t>(seq[2]);
    a.dtype = DType(dtype);
    a.num_heads = num_heads;
    a.q_token_stride = q_strides[0];
    a.q_head_stride = q_strides[1];
    a.num_reqs = num_reqs;
    a.block_table_stride = block_table_stride;
    a.scale = scales[0];
    a.k_scale = scales[1];
    a.v_scale = scales[2];
    a.sliding_window = sliding_window > 0 ? sliding_window : kNoWindow;
    a.softcap = softcap;
    a.sinks = ptr<const float>(extras[0]);
    a.alibi = ptr<const float>(extras[1]);
    if (sliding_window <= 0) {  // windows differ from row to row, and are short
        a.num_groups = group_sizes[0];
        a.num_members = group_sizes[1];
        a.members = ptr<const int32_t>(groups[0]);
        a.group_starts = ptr<const int32_t>(groups[1]);
        a.shared_lens = ptr<const int32_t>(groups[2]);
    }
    if (a.query_start_loc[0] < 0)
        throw std::out_of_range(at("query_start_loc", 0, a.query_start_loc[0]) + " is negative");
    for (int64_t b = 0; b < num_reqs; ++b) check_request(a, b, num_tokens, num_blocks, max_blocks);
    for (int64_t g = 0; g < a.num_groups; ++g) check_group(a, g);
    const int64_t head_bytes = head_dim * size_of(a.dtype), kept_bytes = 2 * num_kv_heads * head_bytes;
    const char* kept = ptr<const char>(write[0]);
    const KvWrite left{ptr<char>(kv_cache), a.layout, kept, kept + kept_bytes / 2, ptr<const int64_t>(write[1]), a.dtype,
                       num_tokens, kept_bytes, head_bytes, kept_bytes, head_bytes, a.k_scale, a.v_scale};
    if (kept != nullptr && is_left_to_attention(a.layout, num_tokens)) {
        check(left, num_blocks);
        a.write = &left;
    }
    const int64_t row_bytes = num_heads * head_bytes;
    const int64_t begin = a.query_start_loc[0], end = a.query_start_loc[num_reqs];  // rows of no request are zero
    std::memset(a.out, 0, size_t(begin * row_bytes));
    std::memset(static_cast<char*>(a.out) + end * row_bytes, 0, size_t((num_tokens - end) * row_bytes));
    attention_kernels().run(a);
}

MINIVLLM_BIND(paged_attention, m) { def_op(m, "paged_attention", &paged_attention); }

}  // namespace minivllm
