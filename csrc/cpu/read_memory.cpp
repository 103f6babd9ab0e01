#include "read_memory.h"

#include <atomic>

#include "isa.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kStride = 512;       // bytes a turn
constexpr int64_t kAhead = 64 * 64;    // bytes the prefetch runs ahead

uint64_t read_range(const char* data, int64_t bytes) {
#if defined(__AVX512F__)
    __m512i sums[8];
    for (auto& s : sums) s = _mm512_setzero_si512();
    for (const char *p = data, *end = data + bytes; p < end; p += kStride)
        for (int i = 0; i < 8; ++i) {
            _mm_prefetch(p + kAhead + 64 * i, _MM_HINT_T0);
            sums[i] = _mm512_xor_si512(sums[i], _mm512_load_si512(p + 64 * i));
        }
    for (int i = 1; i < 8; ++i) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, sums[0]);
#else
    __m256i sums[16];
    for (auto& s : sums) s = _mm256_setzero_si256();
    for (const char *p = data, *end = data + bytes; p < end; p += kStride)
        for (int i = 0; i < 16; ++i) {
            if (i % 2 == 0) _mm_prefetch(p + kAhead + 32 * i, _MM_HINT_T0);
            sums[i] = _mm256_xor_si256(sums[i], _mm256_load_si256((const __m256i*)(p + 32 * i)));
        }
    for (int i = 1; i < 16; ++i) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
    alignas(64) uint64_t words[8] = {};
    _mm256_store_si256((__m256i*)words, sums[0]);
#endif
    uint64_t sum = 0;
    for (uint64_t word : words) sum ^= word;
    return sum;
}

uint64_t read(const void* data, int64_t bytes) {
    std::atomic<uint64_t> sum{0};
    parallel_for(bytes / kStride, 1, [&](int64_t begin, int64_t end) {
        sum ^= read_range(static_cast<const char*>(data) + begin * kStride, (end - begin) * kStride);
    });
    return sum;
}

}  // namespace

const ReadMemoryKernels read_memory_kernels = {&read};

}  // namespace minivllm::MINIVLLM_ISA
