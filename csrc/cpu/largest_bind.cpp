#include "largest.h"

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(largest, m) {
    m.def("largest_magnitude", [](int dtype, uintptr_t x, int64_t n) {
        return largest_kernels().magnitude(DType(dtype), ptr<const void>(x), n);
    }, release_gil);
}

}  // namespace minivllm
