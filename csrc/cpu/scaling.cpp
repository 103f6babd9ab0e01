// factor * x and cap * tanh(x / cap), in place. Each element stands alone; the whole is split over threads.
#include "scaling.h"

#include "isa.h"
#include "thread_pool.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

struct Scale {
    Vec factor;
    Vec operator()(Vec x) const { return factor * x; }
};

struct SoftCap {
    Vec cap;
    Vec operator()(Vec x) const { return cap * tanh(x / cap); }
};

template <class F>
void apply(DType dtype, void* x, int64_t n, const F& f) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr int64_t kChunk = 4096;
        parallel_for((n + kChunk - 1) / kChunk, 2, [&](int64_t begin, int64_t end) {
            T* p = static_cast<T*>(x);
            const int64_t stop = end * kChunk < n ? end * kChunk : n;
            int64_t i = begin * kChunk;
            for (; i + kLanes <= stop; i += kLanes) store(p + i, f(load(p + i)));
            if (const int rest = int(stop - i); rest > 0) store_partial(p + i, f(load_partial(p + i, rest)), rest);
        });
    });
}

void scale(DType dtype, void* x, int64_t n, float factor) { apply(dtype, x, n, Scale{set1(factor)}); }

void soft_cap(DType dtype, void* x, int64_t n, float cap) { apply(dtype, x, n, SoftCap{set1(cap)}); }

}  // namespace

const ScalingKernels scaling_kernels = {&scale, &soft_cap};

}  // namespace minivllm::MINIVLLM_ISA
