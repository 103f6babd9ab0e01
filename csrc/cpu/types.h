// Element types as they lie in memory, and the bridge from a runtime code to a C++ type. No arithmetic:
// what converts them depends on the instruction set and lives in isa.h.
#pragma once

#include <cstdint>

namespace minivllm {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // codes shared with minivllm/ops/native.py

inline constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <class T>
struct Type { using type = T; };

// Calls fn(Type<float>{}), fn(Type<bf16>{}) or fn(Type<f16>{}).
template <class F>
inline __attribute__((always_inline)) void with_dtype(DType dtype, const F& fn) {
    switch (dtype) {
        case DType::f32: return fn(Type<float>{});
        case DType::bf16: return fn(Type<bf16>{});
        case DType::f16: return fn(Type<f16>{});
    }
}

}  // namespace minivllm
