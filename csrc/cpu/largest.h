// The largest magnitude among numbers, in one pass over them. See minivllm/ops/largest.py.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "types.h"

namespace minivllm {

struct LargestKernels {
    // Of n contiguous numbers; NaN if one is, 0 if there are none.
    float (*magnitude)(DType dtype, const void* x, int64_t n);
};
MINIVLLM_KERNELS(LargestKernels, largest_kernels)

}  // namespace minivllm
