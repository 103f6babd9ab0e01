#include "sampling.h"

#include <array>

#include <nanobind/stl/array.h>

#include "../bindings.h"

namespace minivllm {

using Shape = std::array<int64_t, 2>;

static Logits logits_at(uintptr_t data, Shape shape, int64_t row_stride) {
    return {ptr<float>(data), shape[0], shape[1], row_stride};
}

MINIVLLM_BIND(sampling, m) {
    def_op(m, "gumbel_argmax", [](uintptr_t out, uintptr_t broken, uintptr_t logits, uintptr_t temperature,
                              uintptr_t seeds, uintptr_t positions, Shape shape, int64_t row_stride,
                              uint32_t purpose) {
        sampling_kernels().gumbel_argmax(ptr<int64_t>(out), ptr<uint8_t>(broken), logits_at(logits, shape, row_stride),
                                         ptr<const float>(temperature), ptr<const uint64_t>(seeds),
                                         ptr<const uint64_t>(positions), purpose);
    });
    def_op(m, "top_k_top_p_min_p", [](uintptr_t logits, uintptr_t top_k, uintptr_t top_p, uintptr_t log_ratio,
                                  Shape shape, int64_t row_stride) {
        sampling_kernels().top_k_top_p_min_p(logits_at(logits, shape, row_stride), ptr<const int32_t>(top_k),
                                             ptr<const float>(top_p), ptr<const float>(log_ratio));
    });
    def_op(m, "nonfinite_rows", [](uintptr_t out, uintptr_t logits, Shape shape, int64_t row_stride) {
        sampling_kernels().nonfinite_rows(ptr<uint8_t>(out), logits_at(logits, shape, row_stride));
    });
    m.def("philox", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        std::array<uint32_t, 4> words;
        sampling_kernels().philox(words.data(), counter.data(), key.data());
        return words;
    }, "One Philox4x32-10 block: four words. For tests.");
}

}  // namespace minivllm
