// The largest output of each row, found as the outputs are made, which nobody keeps. Included by linear_tile.h.
//
// Which of two numbers leads is a matter of these two and their places: panels may come in any order, from any thread.
#pragma once

#include "linear.h"
#include "thread_pool.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

MINIVLLM_INLINE bool leads(const Leader& a, const Leader& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Lanes of x, marked in `lanes`, are the outputs from `first` on. A NaN counts as infinity: both break a row.
inline void __attribute__((noinline)) look_closer(Leader& leader, Vec x, uint32_t lanes, int64_t first) {
    float values[kLanes];
    store(values, x);
    for (; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const Leader next{values[lane] < kInfinity ? values[lane] : kInfinity, int32_t(first + lane)};
        if (leads(next, leader)) leader = next;
    }
}

// Up to kLanes outputs of a row, the first of which is number `first`. Most have nothing that could lead.
MINIVLLM_INLINE void take_outputs(Leader& leader, Vec x, int64_t first, int64_t count) {
    const uint32_t lanes = lanes_not_less(x, set1(leader.value)) & ((1u << count) - 1);
    if (__builtin_expect(lanes != 0, 0)) look_closer(leader, x, lanes, first);
}

// What one thread finds of some rows, beginning with what all have found by now; `merge` lets them know.
class OwnLeaders {
public:
    OwnLeaders(Leader* shared, int64_t num_rows)
        : shared_(shared), own_(static_cast<Leader*>(thread_scratch(2, size_t(num_rows) * sizeof(Leader)))),
          num_rows_(num_rows) {
        for (int64_t r = 0; r < num_rows_; ++r) __atomic_load(shared_ + r, own_ + r, __ATOMIC_RELAXED);
    }

    Leader* data() const { return own_; }

    void merge() const {
        for (int64_t r = 0; r < num_rows_; ++r) {
            Leader known;
            __atomic_load(shared_ + r, &known, __ATOMIC_RELAXED);
            while (leads(own_[r], known) && !__atomic_compare_exchange(shared_ + r, &known, own_ + r, true,
                                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        }
    }

private:
    Leader* const shared_;
    Leader* const own_;
    const int64_t num_rows_;
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
