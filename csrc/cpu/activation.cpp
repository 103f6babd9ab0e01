// SiLU(gate) * up. Each element stands alone; rows are split over threads.
#include "activation.h"

#include "isa.h"
#include "silu.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

template <class T>
void silu_mul_row(T* out, const T* gate, const T* up, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, silu_mul<T>(load(gate + i), load(up + i)));
    if (const int rest = int(n - i); rest > 0)
        store_partial(out + i, silu_mul<T>(load_partial(gate + i, rest), load_partial(up + i, rest)), rest);
}

void run(DType dtype, void* out, const void* gate_up, int64_t row_stride, int64_t rows, int64_t width) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(rows, 1 + 4096 / width, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* gate = static_cast<const T*>(gate_up) + row * row_stride;
                silu_mul_row(static_cast<T*>(out) + row * width, gate, gate + width, width);
            }
        });
    });
}

}  // namespace

const ActivationKernels activation_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
