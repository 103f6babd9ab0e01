// SiLU(gate) * up and GELU(gate) * up. Each element stands alone; rows are split over threads.
#include "activation.h"

#include "isa.h"
#include "silu.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// act(gate) * up, for each of the activations: act is rounded to T before the product.
struct Silu {
    template <class T> static MINIVLLM_INLINE Vec mul(Vec gate, Vec up) { return silu_mul<T>(gate, up); }
};

// x/2 (1 + tanh u) with u = √(2/π) (x + 0.044715 x³); and (1 + tanh u) / 2 = 1 / (1 + e^(-2u)).
struct GeluTanh {
    template <class T> static MINIVLLM_INLINE Vec mul(Vec gate, Vec up) {
        const Vec minus_2u = gate * fma(gate * gate, set1(-0.0713548163f), set1(-1.59576912f));
        return rounded<T>(gate / (set1(1.0f) + exp(minus_2u))) * up;
    }
};

template <class Act, class T>
void gated_mul_row(T* out, const T* gate, const T* up, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, Act::template mul<T>(load(gate + i), load(up + i)));
    if (const int rest = int(n - i); rest > 0)
        store_partial(out + i, Act::template mul<T>(load_partial(gate + i, rest), load_partial(up + i, rest)), rest);
}

template <class Act>
void gated_mul(DType dtype, void* out, const void* gate_up, int64_t row_stride, int64_t rows, int64_t width) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(rows, 1 + 4096 / width, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* gate = static_cast<const T*>(gate_up) + row * row_stride;
                gated_mul_row<Act>(static_cast<T*>(out) + row * width, gate, gate + width, width);
            }
        });
    });
}

}  // namespace

const ActivationKernels activation_kernels = {&gated_mul<Silu>, &gated_mul<GeluTanh>};

}  // namespace minivllm::MINIVLLM_ISA
