// What top-k, top-p and min-p exclude becomes -inf, by selection instead of a sort: a thread block a row, or a cluster.
//
// A row is read four times where its logits lie apart: for its largest; to count them by depth below it, which shows
// where the cuts must lie; for the few entries that lie there, which the cluster's first block then searches in its
// shared memory; and to be masked. Where too many lie there (ties, flat rows), that block searches the row itself.
//
// Numbers are counted and weights added as whole numbers: no order of threads and no number of blocks changes a
// result.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"
#include "truncation_sizes.h"

namespace minivllm::cuda {

constexpr int kTruncationThreads = 1024;
constexpr int kIndexShift = 32 - 19;
constexpr uint64_t kOne = uint64_t(1) << 44;  // the weight of a row's largest; kMostTokens of them fit
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr float kBinsPerNat = 64.0f;  // of depth; what is deeper than 32 weighs nothing
constexpr int kRest = kBins - 1;      // the bin of what is deeper than all others
constexpr int kNone = kBins;          // no bin
constexpr int kMostCandidates = 3840;
constexpr int kMostWarps = 32;

// Where a row's cuts lie.
struct Plan {
    int first, last;     // bins
    bool is_among_few;   // what lies in them is collected; else the whole row is searched
    bool is_floor;       // nothing has to be searched: all that min-p lets pass stays
    uint64_t k;          // 0: cuts nothing
    uint64_t num_above;  // of the k, in bins before the first
    uint64_t total;      // weight of all that top-p looks at; 0: to be found among what is searched
};

struct Weights {
    uint64_t counted, total;  // of the numbers that were counted in bins, and of all
};

// The last entry that stays, in the order of numbers, descending, and then of indices.
struct Last {
    float value;
    int index;
};

struct TruncationShared {
    uint32_t low[kBins], high[kBins];  // sums of 64 bits; shared memory adds 32 at once
    float value[kMostCandidates];
    int32_t index[kMostCandidates];
    uint64_t of_warp[kMostWarps];
    float top_of_warp[kMostWarps];
    uint64_t before, within;
    int bin, num_candidates;
    // What a cluster's blocks tell one another: each of its share, the first of the row.
    float top;
    Weights weights;
    uint64_t above;
    Plan plan;
    Last last;
};

struct alignas(16) Four {
    float x[4];
};

// Numbers -------------------------------------------------------------------------------------------------------------

MINIVLLM_DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

MINIVLLM_DEVICE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

MINIVLLM_DEVICE float infinity() { return float_of(0x7f800000u); }

// The larger a number, the lower its rank; -0.0 is 0.0's equal.
MINIVLLM_DEVICE uint32_t rank_of(float x) {
    const uint32_t bits = bits_of(x == 0.0f ? 0.0f : x);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

MINIVLLM_DEVICE float number_of(uint32_t rank) { return float_of(rank >> 31 ? rank : ~rank & 0x7fffffffu); }

// w, in [0, 2), in parts of kOne, cut off.
MINIVLLM_DEVICE uint64_t whole_weight(float w) {
    const int bits = int(bits_of(w)), shift = 127 - (bits >> 23);
    const uint64_t mantissa = uint64_t((bits & 0x7fffff) | 0x800000) << 21;
    return mantissa >> (shift < 63 ? shift : 63);
}

MINIVLLM_DEVICE uint64_t weight_below(float x, float top) { return whole_weight(expf(x - top)); }

// What a share p of the weights has to come to.
MINIVLLM_DEVICE uint64_t share_of(float p, uint64_t total) {
    const double share = double(p) * double(total);
    const uint64_t whole = uint64_t(share) + (double(uint64_t(share)) < share);
    return whole > 0 ? whole : 1;
}

// How deep below the largest, in bins; the whole part is the bin.
MINIVLLM_DEVICE float depth_of(float x, float top) { return (top - x) * kBinsPerNat; }

MINIVLLM_DEVICE int bin_of(float depth) { return depth < float(kRest) ? int(depth) : kRest; }

// All threads of a block ----------------------------------------------------------------------------------------------

MINIVLLM_DEVICE uint64_t sum_over_warp(uint64_t x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

template <int kThreads>
MINIVLLM_DEVICE uint64_t sum_over_block(TruncationShared& s, uint64_t x) {
    const int lane = threadIdx.x % 32;
    x = sum_over_warp(x);
    barrier();  // nobody reads an earlier sum's parts any more
    if (lane == 0) s.of_warp[threadIdx.x / 32] = x;
    barrier();
    return sum_over_warp(lane < kThreads / 32 ? s.of_warp[lane] : 0);
}

template <int kThreads>
MINIVLLM_DEVICE float max_over_block(TruncationShared& s, float x) {
    const int lane = threadIdx.x % 32;
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    if (lane == 0) s.top_of_warp[threadIdx.x / 32] = x;
    barrier();
    x = s.top_of_warp[lane < kThreads / 32 ? lane : 0];
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

template <int kThreads>
MINIVLLM_DEVICE void clear_bins(TruncationShared& s) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.low[i] = s.high[i] = 0;
    barrier();
}

MINIVLLM_DEVICE void add_to_bin(TruncationShared& s, int bin, uint32_t amount) { atomic_add(&s.low[bin], amount); }

MINIVLLM_DEVICE void add_to_bin(TruncationShared& s, int bin, uint64_t amount) {
    const uint32_t low = uint32_t(amount), sum = atomic_add(&s.low[bin], low) + low;
    const uint32_t high = uint32_t(amount >> 32) + (sum < low);
    if (high != 0) atomic_add(&s.high[bin], high);
}

// Where a sum over bins first comes to what is needed.
struct Crossing {
    int bin;          // or kNone
    uint64_t before;  // what the bins before it come to
    uint64_t within;  // what it comes to alone
};

template <int kThreads, class Amount>
MINIVLLM_DEVICE Crossing cross(TruncationShared& s, uint64_t needed, Amount amount_of_bin) {
    constexpr int kEach = kBins / kThreads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    barrier();  // the bins are full
    uint64_t amounts[kEach], mine = 0;
    for (int i = 0; i < kEach; ++i) mine += amounts[i] = amount_of_bin(threadIdx.x * kEach + i);
    uint64_t until = mine;
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t from = shuffle(until, lane < step ? lane : lane - step);
        if (lane >= step) until += from;
    }
    if (lane == 31) s.of_warp[warp] = until;
    if (threadIdx.x == 0) s.bin = kNone, s.before = s.within = 0;
    barrier();
    uint64_t sum = until - mine + sum_over_warp(lane < warp ? s.of_warp[lane] : 0);
    if (sum < needed)
        for (int i = 0; i < kEach; ++i) {
            if (sum + amounts[i] >= needed) {
                s.bin = threadIdx.x * kEach + i, s.before = sum, s.within = amounts[i];
                break;
            }
            sum += amounts[i];
        }
    barrier();
    return {s.bin, s.before, s.within};
}

// What is searched: the row, or the candidates found in it ------------------------------------------------------------

struct Row {
    float* x;
    int n;
    int thread, num_threads;  // of those that share it

    // visit(number, index) for a thread's share; most are read in whole 16 bytes, several under way at once.
    template <class Visit>
    MINIVLLM_DEVICE void each(Visit visit) const {
        constexpr int kAtOnce = 4;
        const int begin = first_whole(), num_fours = (n - begin) / 4, rest = begin + num_fours * 4;
        const Four* const fours = reinterpret_cast<const Four*>(x + begin);
        if (thread < begin) visit(x[thread], thread);
        int i = thread;
        for (; i + (kAtOnce - 1) * num_threads < num_fours; i += kAtOnce * num_threads) {
            Four read[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) read[j] = fours[i + j * num_threads];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) visit(read[j].x[c], begin + (i + j * num_threads) * 4 + c);
        }
        for (; i < num_fours; i += num_threads) {
            const Four read = fours[i];
#pragma unroll
            for (int c = 0; c < 4; ++c) visit(read.x[c], begin + i * 4 + c);
        }
        if (rest + thread < n) visit(x[rest + thread], rest + thread);
    }

    // Masks each for which is_dropped(number, index).
    template <class IsDropped>
    MINIVLLM_DEVICE void mask(IsDropped is_dropped) const {
        const int begin = first_whole(), num_fours = (n - begin) / 4, rest = begin + num_fours * 4;
        Four* const fours = reinterpret_cast<Four*>(x + begin);
        const auto mask_one = [&](int i) {
            if (is_dropped(x[i], i)) x[i] = -infinity();
        };
        if (thread < begin) mask_one(thread);
#pragma unroll 4
        for (int i = thread; i < num_fours; i += num_threads) {
            Four four = fours[i];
            bool is_any = false;
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (is_dropped(four.x[c], begin + i * 4 + c)) four.x[c] = -infinity(), is_any = true;
            if (is_any) fours[i] = four;
        }
        if (rest + thread < n) mask_one(rest + thread);
    }

    MINIVLLM_DEVICE int first_whole() const {  // index of the first number that begins 16 bytes
        const int before = int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(float));
        return before < n ? before : n;
    }
};

template <int kThreads>
struct Candidates {
    const TruncationShared& s;

    template <class Visit>
    MINIVLLM_DEVICE void each(Visit visit) const {
        for (int i = threadIdx.x; i < s.num_candidates; i += kThreads) visit(s.value[i], s.index[i]);
    }
};

// The lowest rank such that the entries up to it come to what is needed.
struct Selected {
    uint32_t rank;
    uint64_t missing;  // of what is needed, without that rank's entries
    uint64_t within;   // what those come to
};

// A radix search, the highest digit first. enter(number, index, add) calls add(rank, amount) for what is counted.
// Amounts of 32 bits must not come to more.
template <int kThreads, class Entries, class Enter>
MINIVLLM_DEVICE Selected select(TruncationShared& s, const Entries& entries, uint64_t needed, Enter enter) {
    uint32_t prefix = 0, known = 0;
    Crossing crossing = {};
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 10 ? 0 : shift - kDigitBits) {
        const uint32_t mask = shift == 0 ? (1 << 10) - 1 : kBins - 1;
        clear_bins<kThreads>(s);
        entries.each([&](float x, int index) {
            enter(x, index, [&](uint32_t rank, auto amount) {
                if ((rank & known) == prefix) add_to_bin(s, int(rank >> shift & mask), amount);
            });
        });
        crossing = cross<kThreads>(s, needed, [&](int i) { return uint64_t(s.high[i]) << 32 | s.low[i]; });
        needed -= crossing.before;
        prefix |= uint32_t(crossing.bin) << shift;
        known |= mask << shift;
        if (shift == 0) break;
    }
    return {prefix, needed, crossing.within};
}

// The kernel ----------------------------------------------------------------------------------------------------------

// Entries are all that have to be looked at. k: of the entries, 0 for off; total: what all that survives k and `floor`
// weighs, 0 where that is to be found among the entries; above: what of it is not among them.
template <int kThreads, class Entries>
MINIVLLM_DEVICE Last find_last(TruncationShared& s, const Entries& entries, float top, float floor, uint64_t k, float p,
                               uint64_t total, uint64_t above) {
    float least = floor;
    if (k > 0) {
        const Selected kth = select<kThreads>(s, entries, k, [&](float x, int, auto add) {
            if (x > -infinity()) add(rank_of(x), 1u);
        });
        least = fmaxf(least, number_of(kth.rank));
    }
    if (p >= 1.0f) return {least, kMostTokens};
    if (total == 0) {
        uint64_t mine = 0;
        entries.each([&](float x, int) { mine += x >= least ? weight_below(x, top) : 0; });
        total = sum_over_block<kThreads>(s, mine);
    }
    const Selected end = select<kThreads>(s, entries, share_of(p, total) - above, [&](float x, int, auto add) {
        const uint64_t weight = x >= least ? weight_below(x, top) : 0;
        if (weight > 0) add(rank_of(x), weight);
    });
    least = number_of(end.rank);
    // One tie is kept after another until the target is reached.
    const uint64_t each = weight_below(least, top), num_kept = (end.missing + each - 1) / each;
    if (num_kept * each >= end.within) return {least, kMostTokens};
    const Selected tie = select<kThreads>(s, entries, num_kept, [&](float x, int index, auto add) {
        if (x == least) add(uint32_t(index) << kIndexShift, 1u);
    });
    return {least, int(tie.rank >> kIndexShift)};
}

// What a row asks for.
struct Cuts {
    uint64_t k;  // 0: off
    float p, min_p;

    MINIVLLM_DEVICE bool only_p() const { return k == 0 && min_p <= 0.0f; }
    MINIVLLM_DEVICE bool only_min_p() const { return k == 0 && p >= 1.0f; }
};

// One behind the last bin in which a cut can lie, before any number is counted. largest: of each thread's numbers.
template <int kThreads>
MINIVLLM_DEVICE int end_of_bins(TruncationShared& s, const Cuts& cuts, float top, float largest, float floor, int n) {
    if (cuts.only_p()) {  // n tokens so deep would weigh less than may be left out
        const float depth = kBinsPerNat * logf(float(n) / (1.0f - cuts.p));
        return bin_of(depth) + 2 < kRest ? bin_of(depth) + 2 : kRest;
    }
    int end = cuts.min_p > 0.0f ? bin_of(depth_of(floor, top)) + 1 : kRest;
    if (cuts.k > 0) {  // k threads have seen numbers that are no deeper
        if (largest > -infinity()) atomic_add(&s.low[bin_of(depth_of(largest, top))], 1u);
        const int last = cross<kThreads>(s, cuts.k, [&](int i) { return uint64_t(s.low[i]); }).bin;
        end = last < end ? last + 1 : end;
        clear_bins<kThreads>(s);
    }
    return end < kRest ? end : kRest;
}

// Where to look for the cuts, by the numbers counted in each bin.
template <int kThreads>
MINIVLLM_DEVICE Plan make_plan(TruncationShared& s, Cuts cuts, float top, float floor, Weights weights) {
    Plan plan = {0, cuts.min_p > 0.0f ? bin_of(depth_of(floor, top)) : kRest, false, false, cuts.k, 0, 0};
    if (cuts.k > 0) {
        const Crossing kth = cross<kThreads>(s, cuts.k, [&](int i) { return uint64_t(s.low[i]); });
        if (kth.bin > plan.last) plan.k = 0;  // fewer are left, as with kNone
        else plan.last = kth.bin;
        if (plan.k > 0 && cuts.p >= 1.0f) plan.first = kth.bin, plan.num_above = kth.before;
        plan.is_floor = plan.k == 0 && cuts.p >= 1.0f;
    }
    if (cuts.only_p()) {
        // A bin weighs no more than if all lay at its top, and no less than if all lay at its bottom (1e-5: more than
        // what rounding does to either). Whatever of a row's end is too light or too heavy shows where the cut is not.
        const auto heaviest = [&](int i) {
            return s.low[i] * (whole_weight(expf(float(i) / -kBinsPerNat) * 1.00001f) + 1);
        };
        const auto lightest = [&](int i) {
            return s.low[i] * whole_weight(expf(float(i + 1) / -kBinsPerNat) * 0.99999f);
        };
        uint64_t most = 0, least = 0;
        for (int i = threadIdx.x; i < kRest; i += kThreads) most += heaviest(i), least += lightest(i);
        most = sum_over_block<kThreads>(s, most), least = sum_over_block<kThreads>(s, least);
        const uint64_t needed = share_of(cuts.p, weights.total), too_much = most - weights.counted;
        const uint64_t too_little = weights.counted - least;
        plan.last = cross<kThreads>(s, needed + too_much, heaviest).bin;
        if (needed > too_little) plan.first = cross<kThreads>(s, needed - too_little, lightest).bin;
        plan.total = weights.total;
    }
    uint64_t num_found = 0;
    for (int i = threadIdx.x; i < kBins; i += kThreads) num_found += i >= plan.first && i <= plan.last ? s.low[i] : 0;
    plan.is_among_few = !plan.is_floor && sum_over_block<kThreads>(s, num_found) <= kMostCandidates;
    return plan;
}

// Grid: num_rows times kBlocks, which are a cluster. kBlocks > 1 takes compute capability 9.0.
template <int kThreads, int kBlocks>
MINIVLLM_KERNEL(kThreads, 1)
truncate_rows(Truncation t) {
    MINIVLLM_SHARED(shared);
    TruncationShared& s = *reinterpret_cast<TruncationShared*>(shared);
    const int at = blockIdx.x / kBlocks, rank = blockIdx.x % kBlocks, thread = threadIdx.x;
    float* const logits = t.logits + at * t.row_stride;
    const Row row{logits, t.vocab_size, thread, kThreads};
    const Row share{logits, t.vocab_size, rank * kThreads + thread, kBlocks * kThreads};
    const int k = t.top_k[at];
    const Cuts cuts{k > 0 && k < t.vocab_size ? uint64_t(k) : 0, t.top_p[at], t.min_p[at]};
    if (cuts.only_p() && cuts.p >= 1.0f) return;

    float largest = -infinity();
    share.each([&](float x, int) { largest = x < infinity() ? fmaxf(largest, x) : infinity(); });  // NaN as +inf
    clear_bins<kThreads>(s);
    if (thread == 0) s.num_candidates = 0;
    const float top_here = max_over_block<kThreads>(s, largest);
    if (thread == 0) s.top = top_here;
    cluster_barrier<kBlocks>();
    float top = -infinity();
    for (int i = 0; i < kBlocks; ++i) top = fmaxf(top, in_block<kBlocks>(s, i).top);
    const bool is_broken = top == infinity() || top == -infinity();
    const float floor = top + float(log(double(cuts.min_p)));
    Last last{floor, kMostTokens};

    TruncationShared& leader = in_block<kBlocks>(s, 0);
    if (!is_broken && !cuts.only_min_p()) {
        const int end_bin = end_of_bins<kThreads>(s, cuts, top, largest, floor, t.vocab_size);
        uint64_t counted = 0, total = 0, num_rest = 0;
        share.each([&](float x, int) {
            const float depth = depth_of(x, top);
            const bool is_counted = depth < float(end_bin);
            if (is_counted) atomic_add(&s.low[int(depth)], 1u);
            if (cuts.only_p()) {
                const uint64_t weight = weight_below(x, top);
                total += weight, counted += is_counted ? weight : 0;
            }
            num_rest += depth >= float(kRest) && x > -infinity();
        });
        counted = sum_over_block<kThreads>(s, counted), total = sum_over_block<kThreads>(s, total);
        num_rest = sum_over_block<kThreads>(s, num_rest);
        if (thread == 0) s.low[kRest] = end_bin < kRest ? 0 : uint32_t(num_rest), s.weights = {counted, total};
        cluster_barrier<kBlocks>();
        if (rank == 0) {
            Weights weights = s.weights;
            for (int other = 1; other < kBlocks; ++other) {
                const TruncationShared& theirs = in_block<kBlocks>(s, other);
                for (int i = thread; i < kBins; i += kThreads) s.low[i] += theirs.low[i];
                weights.counted += theirs.weights.counted, weights.total += theirs.weights.total;
            }
            barrier();
            const Plan plan = make_plan<kThreads>(s, cuts, top, floor, weights);
            if (thread == 0) s.plan = plan;
        }
        cluster_barrier<kBlocks>();
        const Plan plan = leader.plan;
        if (plan.is_among_few) {
            const float begin = float(plan.first), end = plan.last < kRest ? float(plan.last + 1) : infinity();
            uint64_t above = 0;
            share.each([&](float x, int index) {
                const float depth = depth_of(x, top);
                // In the last bin, with no end, lie numbers so low that their depth is no finite one.
                if (!(depth < end) && (end < infinity() || !(x > -infinity()))) return;
                if (depth >= begin) {
                    const int place = atomic_add(&leader.num_candidates, 1);
                    if (place < kMostCandidates) leader.value[place] = x, leader.index[place] = index;
                } else if (cuts.p < 1.0f) {
                    above += weight_below(x, top);
                }
            });
            above = sum_over_block<kThreads>(s, above);
            if (thread == 0) s.above = above;
            cluster_barrier<kBlocks>();
        }
        if (rank == 0) {
            uint64_t above = 0;
            if (plan.is_among_few) {
                for (int i = 0; i < kBlocks; ++i) above += in_block<kBlocks>(s, i).above;
                last = find_last<kThreads>(s, Candidates<kThreads>{s}, top, floor, plan.k - plan.num_above, cuts.p,
                                           plan.total, above);
            } else if (!plan.is_floor) {
                last = find_last<kThreads>(s, row, top, floor, plan.k, cuts.p, plan.total, above);
            }
            if (thread == 0) s.last = last;
        }
        cluster_barrier<kBlocks>();
        last = leader.last;
    }
    cluster_barrier<kBlocks>();  // no block may end while others read what it knows
    if (!is_broken)
        share.mask([&](float x, int index) { return x < last.value || (x == last.value && index > last.index); });
}

}  // namespace minivllm::cuda
