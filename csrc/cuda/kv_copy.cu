// Launches the copies of KV blocks, within the device and between it and pinned host memory.
#include "check.h"
#include "kernels.h"
#include "kv_copy.h"

namespace minivllm::cuda {

void copy_blocks(const uint64_t* from, const uint64_t* to, int num_layers, const int64_t* pairs, int num_pairs,
                 int64_t block_bytes, cudaStream_t stream) {
    if (num_pairs == 0 || num_layers == 0) return;
    if (block_bytes % 16 != 0)
        throw std::invalid_argument("copy_blocks: a block of " + std::to_string(block_bytes) +
                                    " bytes is not a multiple of 16");
    copy_blocks_kernel<<<dim3(num_pairs, num_layers), kCopyThreads, 0, stream>>>(from, to, pairs, block_bytes);
    check(cudaGetLastError(), "copy_blocks");
}

void copy_ranges(const std::vector<Range>& ranges, cudaStream_t stream) {
    for (const Range& range : ranges)
        check(cudaMemcpyAsync(reinterpret_cast<void*>(range.to), reinterpret_cast<const void*>(range.from), range.bytes,
                              cudaMemcpyDefault, stream),
              "copy_ranges: " + std::to_string(range.bytes) + " bytes");
}

}  // namespace minivllm::cuda
