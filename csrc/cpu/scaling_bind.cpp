#include "scaling.h"

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(scaling, m) {
    def_op(m, "scale", [](int dtype, uintptr_t x, int64_t n, float factor) {
        scaling_kernels().scale(DType(dtype), ptr<void>(x), n, factor);
    });
    def_op(m, "soft_cap", [](int dtype, uintptr_t x, int64_t n, float cap) {
        scaling_kernels().soft_cap(DType(dtype), ptr<void>(x), n, cap);
    });
}

}  // namespace minivllm
