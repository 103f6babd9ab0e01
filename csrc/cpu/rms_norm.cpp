// RMSNorm. Rows are split over threads.
#include "rms_norm.h"

#include "isa.h"
#include "rms_norm_row.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

void run(DType dtype, void* out, const void* x, const void* weight, const RmsNormRows& rows, float eps) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(rows.outer * rows.inner, 1 + 8192 / rows.hidden, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t i = row / rows.inner, j = row % rows.inner;
                const T* source = static_cast<const T*>(x) + i * rows.outer_stride + j * rows.inner_stride;
                norm_row(static_cast<T*>(out) + row * rows.hidden, source, static_cast<const T*>(weight), rows.hidden,
                         eps);
            }
        });
    });
}

}  // namespace

const RmsNormKernels rms_norm_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
