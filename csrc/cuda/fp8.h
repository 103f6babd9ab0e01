// float8_e4m3 as float16, for cards that have no instruction for it (compute capability below 8.9).
#pragma once

#include <cstdint>

#include "device.h"

namespace minivllm::cuda {

#ifndef MINIVLLM_CONVERTS_FP8
MINIVLLM_DEVICE uint32_t halves_of_fp8(uint32_t codes) {
    const uint32_t spread = pick_bytes(codes, 0, 0x1404);  // each code in the upper byte of its half
    const uint32_t bits = (spread & 0x7f007f00u) >> 1 | (spread & 0x80008000u);
    uint32_t halves = multiply_halves(bits, 0x5c005c00u);  // by 256: the exponents' biases are 8 apart
    if ((spread & 0x7f00u) == 0x7f00u) halves |= 0x7fffu;  // e4m3 has one NaN and no infinity
    if ((spread & 0x7f000000u) == 0x7f000000u) halves |= 0x7fff0000u;
    return halves;
}
#endif

}  // namespace minivllm::cuda
