#include "rms_norm.h"

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(rms_norm, m) {
    def_op(m, "rms_norm", [](int dtype, uintptr_t out, uintptr_t x, int64_t x_outer_stride, int64_t x_inner_stride,
                         uintptr_t residual, int64_t residual_outer_stride, int64_t residual_inner_stride,
                         uintptr_t weight, int weight_dtype, int64_t outer, int64_t inner, int64_t hidden, float eps) {
        const RmsNormRows rows{outer, inner, hidden, x_outer_stride, x_inner_stride, residual_outer_stride,
                               residual_inner_stride};
        rms_norm_kernels().run(DType(dtype), ptr<void>(out), ptr<const void>(x), ptr<void>(residual),
                               ptr<const void>(weight), DType(weight_dtype), rows, eps);
    });
}

}  // namespace minivllm
