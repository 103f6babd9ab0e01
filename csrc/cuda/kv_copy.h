// Moves whole KV blocks: what is in one is of no interest here.
#pragma once

#include <cstdint>

#include "device.h"

namespace minivllm::cuda {

constexpr int kCopyThreads = 256;

// Grid: (num_pairs, num_layers). block_bytes is a multiple of 16.
MINIVLLM_KERNEL(kCopyThreads, 1)
copy_blocks_kernel(const uint64_t* from, const uint64_t* to, const int64_t* pairs, int64_t block_bytes) {
    const int64_t source = pairs[2 * blockIdx.x], target = pairs[2 * blockIdx.x + 1];
    const uint4* const read = reinterpret_cast<const uint4*>(from[blockIdx.y] + source * block_bytes);
    uint4* const write = reinterpret_cast<uint4*>(to[blockIdx.y] + target * block_bytes);
    for (int64_t i = threadIdx.x; i < block_bytes / 16; i += kCopyThreads) write[i] = read[i];
}

}  // namespace minivllm::cuda
