// SiLU(gate) * up, as the activation kernel and the linear layer's epilogue compute it. The rules of isa.h hold here.
#pragma once

#include "isa.h"

namespace minivllm::MINIVLLM_ISA {

// The SiLU is rounded to T before the product, as Hugging Face does.
template <class T>
MINIVLLM_INLINE Vec silu_mul(Vec gate, Vec up) {
    return rounded<T>(gate / (set1(1.0f) + exp(zero() - gate))) * up;
}

}  // namespace minivllm::MINIVLLM_ISA
