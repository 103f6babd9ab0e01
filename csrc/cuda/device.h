// What the CUDA kernels use of the machine, in a dozen functions: barriers, shuffles, clusters, asynchronous copies,
// atomic sums, tensor cores.
//
// Kernels are written in plain C++ over these, so that tests/cuda/emulate.h can take this file's place (compile with
// -DMINIVLLM_EMULATE_CUDA) and run the same kernels on a CPU, a fiber a thread.
#pragma once

#include <cstdint>

#ifdef MINIVLLM_EMULATE_CUDA
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace minivllm::cuda {

// All 16 bytes, or zeros where !valid: then nothing is read. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes the group of a thread's copies since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kLeft of a thread's groups are under way. Other threads see its copies behind a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Until all threads of a cluster of so many blocks have come here.
template <int kBlocks>
__device__ __forceinline__ void cluster_barrier() {
    if constexpr (kBlocks == 1) {
        __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;\n" ::: "memory");
#else
        __trap();
#endif
    }
}

// What another block of the cluster has where this one has `shared`.
template <int kBlocks, class T>
__device__ __forceinline__ T& in_block(T& shared, int rank) {
    uint64_t address = reinterpret_cast<uint64_t>(&shared);
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("mapa.u64 %0, %1, %2;\n" : "=l"(address) : "l"(address), "r"(rank));
#endif
    return *reinterpret_cast<T*>(address);
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Returns what was there.
template <class T>
__device__ __forceinline__ T atomic_add(T* to, T amount) {
    return atomicAdd(to, amount);
}

// c += a · b for a 16 × 16, b 16 × 8, sums in float32; each thread holds its share as PTX's mma.m16n8k16 lays it out.
template <bool kIsBf16>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kIsBf16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};\n"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};\n"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bytes of (low, high) that the four nibbles of `selector` name, lowest first.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}

__device__ __forceinline__ float exp_2(float x) { return exp2f(x); }

// Two numbers rounded to nearest, the first in the low half.
template <bool kIsBf16>
__device__ __forceinline__ uint32_t pack(float first, float second) {
    uint32_t packed;
    if constexpr (kIsBf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
        memcpy(&packed, &pair, 4);
    } else {
        const __half2 pair = __floats2half2_rn(first, second);
        memcpy(&packed, &pair, 4);
    }
    return packed;
}

// The number in the low half.
template <bool kIsBf16>
__device__ __forceinline__ float unpack(uint32_t bits) {
    if constexpr (kIsBf16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Of two float16 numbers each, exact where the results are.
__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    const __half2 difference = __hsub2(x, y);
    memcpy(&a, &difference, 4);
    return a;
}

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    const __half2 product = __hmul2(x, y);
    memcpy(&a, &product, 4);
    return a;
}

#if __CUDA_ARCH__ >= 890
#define MINIVLLM_CONVERTS_FP8
// Two float8_e4m3 codes, in the low half of `codes`, as float16: exact, NaN included.
__device__ __forceinline__ uint32_t halves_of_fp8(uint32_t codes) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<unsigned short>(codes)));
    return halves;
}
#endif

}  // namespace minivllm::cuda

#define MINIVLLM_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define MINIVLLM_DEVICE __device__ __forceinline__
#define MINIVLLM_SHARED(name) extern __shared__ __align__(16) char name[]

#endif  // MINIVLLM_EMULATE_CUDA
