// RMSNorm, with or without the residual addition before it. Rows are split over threads.
#include "rms_norm.h"

#include "isa.h"
#include "rms_norm_row.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

template <class T>
void add_to(T* residual, const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
    if (const int rest = int(n - i); rest > 0)
        store_partial(residual + i, load_partial(residual + i, rest) + load_partial(x + i, rest), rest);
}

template <class T, class W>
void norm_rows(void* out, const void* x, void* residual, const W* weight, const RmsNormRows& rows, float eps) {
    parallel_for(rows.outer * rows.inner, 1 + 8192 / rows.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t i = row / rows.inner, j = row % rows.inner;
            const T* source = static_cast<const T*>(x) + i * rows.x_outer_stride + j * rows.x_inner_stride;
            if (residual != nullptr) {
                T* sum = static_cast<T*>(residual) + i * rows.residual_outer_stride +
                         j * rows.residual_inner_stride;
                add_to(sum, source, rows.hidden);
                source = sum;
            }
            norm_row(static_cast<T*>(out) + row * rows.hidden, source, weight, rows.hidden, eps);
        }
    });
}

void run(DType dtype, void* out, const void* x, void* residual, const void* weight, DType weight_dtype,
         const RmsNormRows& rows, float eps) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (weight_dtype == dtype) norm_rows<T>(out, x, residual, static_cast<const T*>(weight), rows, eps);
        else norm_rows<T>(out, x, residual, static_cast<const float*>(weight), rows, eps);
    });
}

}  // namespace

const RmsNormKernels rms_norm_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
