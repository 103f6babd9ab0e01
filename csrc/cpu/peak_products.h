// Products as fast as the processor can make them, from operands in L1: what benchmarks/roofline.py holds kernels against.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minivllm {

struct PeakProductsKernels {
    // Every thread multiplies for `rounds` rounds, and stores nothing. Operations done in all, a multiply-add being two; 0
    // where this instruction set has no matrix products. The clock follows the data: operands are random numbers.
    double (*bf16)(int64_t rounds);
    double (*int8)(int64_t rounds);
};
MINIVLLM_KERNELS(PeakProductsKernels, peak_products_kernels)

}  // namespace minivllm
