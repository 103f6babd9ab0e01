// csrc/cuda/device.h for a CPU: the kernels' own source, a thread block at a time, each thread a fiber.
//
// Fibers change only where a kernel synchronises, so a missing barrier shows as a wrong result, not now and then. An
// asynchronous copy happens as late as it may: when its group is waited for. Tensor-core products are computed from
// the layout in the PTX manual (mma.m16n8k16), in float32, k ascending.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct Dim {
    int x = 1, y = 1, z = 1;
};

namespace minivllm::cuda {

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    bool done = false;
    long waits = 0;     // barriers passed so far, of all threads and of the warp
    long warp_waits = 0, cluster_waits = 0;
    uint32_t sent[8];   // what the lane shows the others
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline int current;
inline int block_threads, block_shared;  // of each block of the cluster that runs: how many, and bytes
inline std::vector<char> shared_memory;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current]->context, &scheduler); }

// Until all of threads [first, last) have come as far; one that has returned counts as there.
inline void meet(int first, int last, long Fiber::* count) {
    const long mine = ++(fibers[current].get()->*count);
    for (;;) {
        bool all = true;
        for (int i = first; i < last; ++i) all &= fibers[i]->done || fibers[i].get()->*count >= mine;
        if (all) return;
        yield();
    }
}

inline void barrier() {
    const int first = current / block_threads * block_threads;
    meet(first, first + block_threads, &Fiber::waits);
}
inline void warp_barrier() { meet(current / 32 * 32, current / 32 * 32 + 32, &Fiber::warp_waits); }

template <int kBlocks>
void cluster_barrier() {
    meet(0, int(fibers.size()), &Fiber::cluster_waits);
}

template <int kBlocks, class T>
T& in_block(T& shared, int rank) {
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(&shared) + (rank - current / block_threads) * block_shared);
}

template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(Fiber::sent));
    std::memcpy(fibers[current]->sent, &value, sizeof(T));
    warp_barrier();
    T got;
    std::memcpy(&got, fibers[current / 32 * 32 + lane]->sent, sizeof(T));
    warp_barrier();
    return got;
}

template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, current % 32 ^ mask);
}

template <class T>
T atomic_add(T* to, T amount) {
    const T before = *to;
    *to += amount;
    return before;
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
        std::fprintf(stderr, "an asynchronous copy is not aligned\n");
        std::abort();
    }
    fibers[current]->open.push_back({shared, global, valid});
}

inline void commit_copies() {
    fibers[current]->groups.push_back(std::move(fibers[current]->open));
    fibers[current]->open.clear();
}

template <int kLeft>
void wait_copies() {
    auto& groups = fibers[current]->groups;
    for (; int(groups.size()) > kLeft; groups.pop_front())
        for (const Copy& copy : groups.front()) {
            if (copy.valid) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return picked;
}

inline float exp_2(float x) { return std::exp2(x); }

template <bool kIsBf16>
uint16_t round_to(float x) {
    if constexpr (kIsBf16) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (x != x) return 0x7fff;
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        const _Float16 half = _Float16(x);
        uint16_t bits;
        std::memcpy(&bits, &half, 2);
        return bits;
    }
}

template <bool kIsBf16>
uint32_t pack(float first, float second) {
    return round_to<kIsBf16>(first) | uint32_t(round_to<kIsBf16>(second)) << 16;
}

template <bool kIsBf16>
float unpack(uint32_t bits) {
    if constexpr (kIsBf16) {
        bits <<= 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    } else {
        const uint16_t low = uint16_t(bits);
        _Float16 x;
        std::memcpy(&x, &low, 2);
        return float(x);
    }
}

inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return pack<false>(unpack<false>(a) - unpack<false>(b), unpack<false>(a >> 16) - unpack<false>(b >> 16));
}

inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
    return pack<false>(unpack<false>(a) * unpack<false>(b), unpack<false>(a >> 16) * unpack<false>(b >> 16));
}

// Lane 4 g + t holds, of a 16 × 16 a, the pairs (row, column) a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8),
// a3 (g + 8, 2t + 8); of a 16 × 8 b, the pairs down column g that begin at rows 2t and 2t + 8; of c, rows g and
// g + 8 at columns 2t and 2t + 1.
template <bool kIsBf16>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t sent[8] = {a[0], a[1], a[2], a[3], b[0], b[1], 0, 0};
    std::memcpy(fibers[current]->sent, sent, sizeof(sent));
    warp_barrier();
    const auto lane = [](int g, int t) { return fibers[current / 32 * 32 + 4 * g + t]->sent; };
    const int g = current % 32 / 4, t = current % 4;
    float result[4];
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = lane(row % 8, k % 8 / 2)[row / 8 + k / 8 * 2] >> 16 * (k % 2);
            const uint32_t right = lane(column, k % 8 / 2)[4 + k / 8] >> 16 * (k % 2);
            sum += unpack<kIsBf16>(left) * unpack<kIsBf16>(right);
        }
        result[i] = c[i] + sum;
    }
    warp_barrier();
    std::copy(result, result + 4, c);
}

// Running kernels -------------------------------------------------------------

inline Dim grid_place, thread_place;
#define blockIdx grid_place
#define threadIdx thread_place

inline void fiber_main() {
    body();
    fibers[current]->done = true;
    yield();
}

// The blocks of a cluster, from grid_place on.
inline void run_blocks(int num_blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
    const int num_threads = num_blocks * threads, first = grid_place.x;
    body = kernel;
    block_threads = threads, block_shared = (shared_bytes + 15) / 16 * 16;
    shared_memory.assign(num_blocks * block_shared + 16, char(0xff));  // NaN, wherever it is read before it is written
    fibers.clear();
    for (int i = 0; i < num_threads; ++i) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (int num_done = 0; num_done < num_threads;)
        for (current = 0; current < num_threads; ++current) {
            if (fibers[current]->done) continue;
            thread_place.x = current % threads;
            grid_place.x = first + current / threads;
            swapcontext(&scheduler, &fibers[current]->context);
            num_done += fibers[current]->done;
        }
}

// kernel(arguments…) for every thread of every block of the grid.
template <class... Takes, class... Gives>
void run_grid(void (*kernel)(Takes...), Dim grid, int num_threads, int shared_bytes, Gives... given) {
    for (int z = 0; z < grid.z; ++z)
        for (int y = 0; y < grid.y; ++y)
            for (int x = 0; x < grid.x; ++x) {
                grid_place = {x, y, z};
                run_blocks(1, num_threads, shared_bytes, [&] { kernel(given...); });
            }
}

// The same for so many clusters of blocks, one after the other.
template <class... Takes, class... Gives>
void run_clusters(void (*kernel)(Takes...), int num_clusters, int num_blocks, int num_threads, int shared_bytes,
                  Gives... given) {
    for (int i = 0; i < num_clusters; ++i) {
        grid_place = {i * num_blocks, 0, 0};
        run_blocks(num_blocks, num_threads, shared_bytes, [&] { kernel(given...); });
    }
}

inline char* shared_begin() {
    char* const begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
    return begin + current / block_threads * block_shared;
}

}  // namespace minivllm::cuda

#define MINIVLLM_KERNEL(threads, blocks_per_sm) static void
#define MINIVLLM_DEVICE inline
#define MINIVLLM_SHARED(name) char* const name = shared_begin()
