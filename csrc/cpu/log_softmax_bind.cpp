#include "log_softmax.h"

#include <array>

#include <nanobind/stl/array.h>

#include "../bindings.h"

namespace minivllm {

using Shape = std::array<int64_t, 2>;

MINIVLLM_BIND(log_softmax, m) {
    def_op(m, "log_softmax", [](uintptr_t out, uintptr_t logits, Shape shape, int64_t row_stride) {
        log_softmax_kernels().log_softmax(ptr<float>(out), ptr<const float>(logits), shape[0], shape[1], row_stride);
    });
}

}  // namespace minivllm
