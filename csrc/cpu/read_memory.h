// Reading memory as fast as it can be read: what benchmarks/roofline.py holds the kernels against.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct ReadMemoryKernels {
    // The exclusive or of all 64-bit words of `bytes` bytes, a multiple of 512 on a cache line; read by all threads.
    uint64_t (*read)(const void* data, int64_t bytes);
};
MINIVLLM_KERNELS(ReadMemoryKernels, read_memory_kernels)

}  // namespace minivllm
