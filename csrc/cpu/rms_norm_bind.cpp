#include "rms_norm.h"

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(rms_norm, m) {
    m.def("rms_norm", [](int dtype, uintptr_t out, uintptr_t x, int64_t outer_stride, int64_t inner_stride,
                         uintptr_t weight, int64_t outer, int64_t inner, int64_t hidden, float eps) {
        const RmsNormRows rows{outer, inner, hidden, outer_stride, inner_stride};
        rms_norm_kernels().run(DType(dtype), ptr<void>(out), ptr<const void>(x), ptr<const void>(weight), rows, eps);
    }, release_gil);
}

}  // namespace minivllm
