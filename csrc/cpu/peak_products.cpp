#include "peak_products.h"

#include <cstring>

#include "isa.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

constexpr int kSteps = 8;           // of the inner loop, two tiles of either operand each: 32 KiB in all
constexpr int64_t kTileBytes = 1024;
constexpr int kOperationsBf16 = 2 * 16 * 16 * 32, kOperationsInt8 = 2 * 16 * 16 * 64;

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Random bytes; as bfloat16, random numbers from -2 to 2.
void fill(uint8_t* data, bool is_bf16) {
    uint32_t state = 1;
    for (int64_t i = 0; i < kSteps * 4 * kTileBytes; i += 2) {
        state = state * 1664525 + 1013904223;
        uint16_t pair = uint16_t(state >> 16);
        if (is_bf16) pair = uint16_t(float_to_bits(float(int32_t(state)) * 0x1p-30f) >> 16);
        std::memcpy(data + i, &pair, 2);
    }
}

template <bool kBf16>
void multiply(int64_t rounds) {
    uint8_t* const data = static_cast<uint8_t*>(thread_scratch(1, kSteps * 4 * kTileBytes));
    fill(data, kBf16);
    const Config config;
    asm volatile("" ::: "memory");  // gcc 12 takes _tile_loadconfig to read 8 bytes
    _tile_loadconfig(&config);
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int step = 0; step < kSteps; ++step) {
            const uint8_t* const tiles = data + step * 4 * kTileBytes;
            _tile_loadd(4, tiles, 64);
            _tile_loadd(5, tiles + kTileBytes, 64);
            _tile_loadd(6, tiles + 2 * kTileBytes, 64);
            _tile_loadd(7, tiles + 3 * kTileBytes, 64);
            if constexpr (kBf16) {
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
            }
        }
    }
    _tile_release();
}

template <bool kBf16>
double peak(int64_t rounds) {
    const int64_t threads = num_threads();
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) multiply<kBf16>(rounds);
    });
    return double(threads) * double(rounds) * kSteps * 4 * (kBf16 ? kOperationsBf16 : kOperationsInt8);
}

#else

template <bool>
double peak(int64_t) { return 0; }

#endif

}  // namespace

const PeakProductsKernels peak_products_kernels = {&peak<true>, &peak<false>};

}  // namespace minivllm::MINIVLLM_ISA
