// What a launch of the decode kernels is told. Plain C++.
#pragma once

#include <cstdint>

namespace minivllm::cuda {

enum class KvType : int { same = 0, fp8_e4m3 = 1, int8 = 2 };  // same: as the queries

// Addresses, sizes and strides of a launch. Strides of q and out are in elements, of the cache in bytes.
struct DecodeAttention {
    void* out;                   // [num_reqs, num_heads, head_dim], heads contiguous
    const void* q;               // [num_reqs, num_heads, head_dim]
    const char* cache;
    const int32_t* block_table;  // [num_reqs, table_stride]
    const int32_t* seq_lens;     // [num_reqs]; 0: no request, its row of `out` stays as it is
    float* part_sums;            // [num_reqs, max_segments, num_heads, head_dim]; null if max_segments is 1
    float* part_tops;            // [num_reqs, max_segments, num_heads, 2]: maximum, sum of weights
    const float* sinks;          // [num_heads], or null
    int num_reqs, num_heads, num_kv_heads, head_dim, block_size;
    int max_segments;            // no request is longer
    int num_parts;               // thread blocks of a request and KV head, which share its segments, see decode_part
    int window;                  // a row sees at most so many positions, its own included; 0: all
    bool is_bf16;                // q and out, else float16
    int64_t q_token_stride, q_head_stride, out_token_stride, table_stride;
    int64_t block_bytes, half_bytes, head_bytes;  // from a block to the next, from K to V, from a KV head to the next
    float scale, softcap, value_scale;            // softcap 0: none
};

}  // namespace minivllm::cuda
