#include "bitmask.h"

#include <array>

#include <nanobind/stl/array.h>

#include "../bindings.h"

namespace minivllm {

using Shape = std::array<int64_t, 2>;

MINIVLLM_BIND(bitmask, m) {
    def_op(m, "apply_bitmask", [](uintptr_t logits, Shape shape, int64_t row_stride, uintptr_t rows, uintptr_t bits,
                              Shape bits_shape) {
        bitmask_kernels().apply(ptr<float>(logits), shape[1], row_stride, ptr<const int64_t>(rows), bits_shape[0],
                                ptr<const uint32_t>(bits), bits_shape[1]);
    });
}

}  // namespace minivllm
