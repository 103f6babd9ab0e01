// Without their sign, the bits of numbers are integers in the same order, those of a NaN above those of infinity.
#include "largest.h"

#include <cstring>

#include "isa.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

template <class U>
U largest_bits(const U* x, int64_t n) {
    constexpr U kMagnitude = U(U(~U(0)) >> 1);
    U most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const U bits = x[i] & kMagnitude;
        most = bits > most ? bits : most;
    }
    return most;
}

template <class T, class U>
float magnitude_of(const void* x, int64_t n) {
    std::atomic<U> most{0};
    parallel_for(n, 1 << 16, [&](int64_t begin, int64_t end) {
        const U found = largest_bits(static_cast<const U*>(x) + begin, end - begin);
        for (U seen = most; found > seen && !most.compare_exchange_weak(seen, found);) {}
    });
    const U bits = most;
    T number;
    std::memcpy(&number, &bits, sizeof number);
    return to_float(number);
}

float magnitude(DType dtype, const void* x, int64_t n) {
    switch (dtype) {
        case DType::f32: return magnitude_of<float, uint32_t>(x, n);
        case DType::bf16: return magnitude_of<bf16, uint16_t>(x, n);
        case DType::f16: return magnitude_of<f16, uint16_t>(x, n);
    }
    return 0;
}

}  // namespace

const LargestKernels largest_kernels = {&magnitude};

}  // namespace minivllm::MINIVLLM_ISA
