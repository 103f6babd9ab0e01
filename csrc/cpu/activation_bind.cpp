#include "activation.h"

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(activation, m) {
    def_op(m, "silu_mul", [](int dtype, uintptr_t out, uintptr_t gate_up, int64_t row_stride, int64_t rows, int64_t width) {
        activation_kernels().silu_mul(DType(dtype), ptr<void>(out), ptr<const void>(gate_up), row_stride, rows, width);
    });
    def_op(m, "gelu_tanh_mul", [](int dtype, uintptr_t out, uintptr_t gate_up, int64_t row_stride, int64_t rows,
                              int64_t width) {
        activation_kernels().gelu_tanh_mul(DType(dtype), ptr<void>(out), ptr<const void>(gate_up), row_stride, rows,
                                           width);
    });
}

}  // namespace minivllm
