// What the bindings call: host functions that launch on a stream and return before the work is done.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "decode_attention_sizes.h"
#include "truncation_sizes.h"

namespace minivllm::cuda {

// Raises std::invalid_argument where there is no kernel for the sizes, std::runtime_error where the launch fails.
void decode_attention(const DecodeAttention& p, KvType kv, cudaStream_t stream);

// Masks what top-k, top-p and min-p exclude, in place. Raises std::invalid_argument for rows of too many logits.
void truncate(const Truncation& t, int num_rows, cudaStream_t stream);

// Copies blocks within one cache and another or the same: to[pairs[2 i + 1]] = from[pairs[2 i]], in each of the layers.
// Addresses of the layers' caches, and `pairs` ([num_pairs, 2] int64), are in device memory; pinned host memory will do
// for caches. No block may be in both columns.
void copy_blocks(const uint64_t* from, const uint64_t* to, int num_layers, const int64_t* pairs, int num_pairs,
                 int64_t block_bytes, cudaStream_t stream);

// One asynchronous copy by the copy engines for each (from, to, bytes), between device memory and pinned host memory.
struct Range {
    uint64_t from, to, bytes;
};
void copy_ranges(const std::vector<Range>& ranges, cudaStream_t stream);

}  // namespace minivllm::cuda
