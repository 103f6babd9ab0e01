// What top-k, top-p and min-p exclude becomes -inf: a thread block a row, by selection instead of a sort.
//
// A row is read four times where its logits lie apart: for its largest; to count them by depth below it, which shows
// where the cuts must lie; for the few entries that lie there, which then are searched in shared memory; and to be
// masked. Where too many lie there (ties, flat rows), the same search goes through the row itself.
//
// Numbers are counted and weights added as whole numbers: no order of threads changes a result.
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

struct TruncationShared {
    uint32_t low[kBins], high[kBins];  // sums of 64 bits; shared memory adds 32 at once
    float value[kMostCandidates];
    int32_t index[kMostCandidates];
    uint64_t of_warp[kMostWarps];
    float top_of_warp[kMostWarps];
    uint64_t before, within;
    int bin, num_candidates;
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

// Which of the bins of depth; not of -inf - -inf.
MINIVLLM_DEVICE int depth_bin(float x, float top) {
    const float bin = (top - x) * kBinsPerNat;
    return bin < float(kRest) ? int(bin) : kRest;
}

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

// What is searched: the row, or the candidates found in it --------------------------------------------------------------

template <int kThreads>
struct Row {
    float* x;
    int n;

    // visit(number, index) for each, shared among the threads; most are read in whole 16 bytes, several under way at once.
    template <class Visit>
    MINIVLLM_DEVICE void each(Visit visit) const {
        constexpr int kAtOnce = 4;
        const int begin = first_whole(), num_fours = (n - begin) / 4, rest = begin + num_fours * 4;
        const Four* const fours = reinterpret_cast<const Four*>(x + begin);
        if (int(threadIdx.x) < begin) visit(x[threadIdx.x], int(threadIdx.x));
        int i = threadIdx.x;
        for (; i + (kAtOnce - 1) * kThreads < num_fours; i += kAtOnce * kThreads) {
            Four read[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) read[j] = fours[i + j * kThreads];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) visit(read[j].x[c], begin + (i + j * kThreads) * 4 + c);
        }
        for (; i < num_fours; i += kThreads) {
            const Four read = fours[i];
#pragma unroll
            for (int c = 0; c < 4; ++c) visit(read.x[c], begin + i * 4 + c);
        }
        if (rest + int(threadIdx.x) < n) visit(x[rest + threadIdx.x], rest + int(threadIdx.x));
    }

    // Masks each for which is_dropped(number, index).
    template <class IsDropped>
    MINIVLLM_DEVICE void mask(IsDropped is_dropped) const {
        const int begin = first_whole(), num_fours = (n - begin) / 4, rest = begin + num_fours * 4;
        Four* const fours = reinterpret_cast<Four*>(x + begin);
        const auto mask_one = [&](int i) {
            if (is_dropped(x[i], i)) x[i] = -infinity();
        };
        if (int(threadIdx.x) < begin) mask_one(threadIdx.x);
#pragma unroll 4
        for (int i = threadIdx.x; i < num_fours; i += kThreads) {
            Four four = fours[i];
            bool is_any = false;
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (is_dropped(four.x[c], begin + i * 4 + c)) four.x[c] = -infinity(), is_any = true;
            if (is_any) fours[i] = four;
        }
        if (rest + int(threadIdx.x) < n) mask_one(rest + threadIdx.x);
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

// The last entry that stays, in the order of numbers, descending, and then of indices.
struct Last {
    float value;
    int index;
};

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

// Grid: num_rows.
template <int kThreads, int kBlocksPerSm>
MINIVLLM_KERNEL(kThreads, kBlocksPerSm)
truncate_rows(Truncation t) {
    MINIVLLM_SHARED(shared);
    TruncationShared& s = *reinterpret_cast<TruncationShared*>(shared);
    const Row<kThreads> row{t.logits + blockIdx.x * t.row_stride, t.vocab_size};
    const float p = t.top_p[blockIdx.x], min_p = t.min_p[blockIdx.x];
    uint64_t k = t.top_k[blockIdx.x] > 0 && t.top_k[blockIdx.x] < t.vocab_size ? t.top_k[blockIdx.x] : 0;
    if (k == 0 && p >= 1.0f && min_p <= 0.0f) return;

    float top = -infinity();
    row.each([&](float x, int) { top = x < infinity() ? fmaxf(top, x) : infinity(); });  // NaN as +inf
    top = max_over_block<kThreads>(s, top);
    if (top == infinity() || top == -infinity()) return;
    const float floor = top + float(log(double(min_p)));
    if (k == 0 && p >= 1.0f) {
        row.mask([&](float x, int) { return x < floor; });
        return;
    }

    if (threadIdx.x == 0) s.num_candidates = 0;
    clear_bins<kThreads>(s);
    uint64_t total = 0, num_deep = 0;
    row.each([&](float x, int) {
        const int bin = depth_bin(x, top);
        if (bin < kRest) {
            atomic_add(&s.low[bin], 1u);
            if (p < 1.0f) total += weight_below(x, top);
        } else if (x > -infinity()) {
            ++num_deep;
        }
    });
    num_deep = sum_over_block<kThreads>(s, num_deep);
    if (threadIdx.x == 0) s.low[kRest] = uint32_t(num_deep);
    total = sum_over_block<kThreads>(s, total);

    // The first and the last bin that have to be looked at.
    uint64_t num_above = 0;  // of the k
    int first = 0, last = min_p > 0.0f ? depth_bin(floor, top) : kRest;
    if (k > 0) {
        const Crossing kth = cross<kThreads>(s, k, [&](int i) { return uint64_t(s.low[i]); });
        if (kth.bin > last) k = 0;  // fewer are left, as with kNone
        else last = kth.bin;
        if (k > 0 && p >= 1.0f) first = kth.bin, num_above = kth.before;
    }
    if (p >= 1.0f && k == 0) {
        row.mask([&](float x, int) { return x < floor; });
        return;
    }
    if (k == 0 && min_p <= 0.0f) {
        // A bin weighs no more than if all lay at its top, and no less than if all lay at its bottom (1e-5: more than
        // what rounding does to either). Whatever of a row's end is too light or too heavy shows where the cut is not.
        const auto heaviest = [&](int i) {
            return s.low[i] * (whole_weight(expf(float(i) / -kBinsPerNat) * 1.00001f) + 1);
        };
        const auto lightest = [&](int i) {
            return i == kRest ? 0 : s.low[i] * whole_weight(expf(float(i + 1) / -kBinsPerNat) * 0.99999f);
        };
        uint64_t most = 0, least = 0;
        for (int i = threadIdx.x; i < kBins; i += kThreads) most += heaviest(i), least += lightest(i);
        most = sum_over_block<kThreads>(s, most), least = sum_over_block<kThreads>(s, least);
        const uint64_t needed = share_of(p, total);
        last = cross<kThreads>(s, needed + (most - total), heaviest).bin;
        if (needed > total - least) first = cross<kThreads>(s, needed - (total - least), lightest).bin;
    } else if (p < 1.0f) {
        total = 0;  // of what survives
    }
    uint64_t num_found = 0;
    for (int i = threadIdx.x; i < kBins; i += kThreads) num_found += i >= first && i <= last ? s.low[i] : 0;
    num_found = sum_over_block<kThreads>(s, num_found);

    Last end;
    if (num_found <= kMostCandidates) {
        uint64_t above = 0;
        row.each([&](float x, int index) {
            const int bin = depth_bin(x, top);
            if (bin > last || x == -infinity()) return;
            if (bin >= first) {
                const int place = atomic_add(&s.num_candidates, 1);
                s.value[place] = x, s.index[place] = index;
            } else if (p < 1.0f) {
                above += weight_below(x, top);
            }
        });
        above = sum_over_block<kThreads>(s, above);
        end = find_last<kThreads>(s, Candidates<kThreads>{s}, top, floor, k - num_above, p, total, above);
    } else {
        end = find_last<kThreads>(s, row, top, floor, k, p, total, 0);
    }
    row.mask([&](float x, int index) { return x < end.value || (x == end.value && index > end.index); });
}

}  // namespace minivllm::cuda
