#include "sampling.h"

#include "vocab.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// ---- noise ----

struct PhiloxKey {
    uint32_t low, high;
};

#if defined(__AVX512F__)
// 64-bit lanes: the product of the lower halves; the upper half, put in place of the lower too; the lower halves of a and b.
MINIVLLM_INLINE UVec multiply(UVec a, UVec b) { return {_mm512_mul_epu32(a.v, b.v)}; }
MINIVLLM_INLINE UVec upper_half(UVec a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
MINIVLLM_INLINE UVec join(UVec a, UVec b) {
    return {_mm512_mask_shuffle_epi32(a.v, 0xaaaa, b.v, _MM_PERM_CCAA)};
}
MINIVLLM_INLINE UVec xor3(UVec a, UVec b, UVec c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)}; }
#else
MINIVLLM_INLINE UVec multiply(UVec a, UVec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
MINIVLLM_INLINE UVec upper_half(UVec a) { return {_mm256_shuffle_epi32(a.v, 0xf5)}; }
MINIVLLM_INLINE UVec join(UVec a, UVec b) { return {_mm256_blend_epi32(a.v, _mm256_shuffle_epi32(b.v, 0xa0), 0xaa)}; }
MINIVLLM_INLINE UVec xor3(UVec a, UVec b, UVec c) { return a ^ b ^ c; }
#endif

// Philox4x32-10 (Salmon et al., SC 2011) of kLanes / 2 counters at once, in the lower halves of 64-bit lanes; c becomes the
// four words. What the upper halves hold meanwhile is nobody's: no product looks at them.
MINIVLLM_INLINE void philox(UVec (&c)[4], PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
        const UVec a = multiply(c[0], uset1(0xd2511f53)), b = multiply(c[2], uset1(0xcd9e8d57));
        c[0] = xor3(upper_half(b), c[1], uset1(key.low));
        c[1] = b;
        c[2] = xor3(upper_half(a), c[3], uset1(key.high));
        c[3] = a;
        key.low += 0x9e3779b9;
        key.high += 0xbb67ae85;
    }
}

// Standard Gumbel noise from 23 random bits, within 6e-7: u = (bits + ½) 2^-23 is exact and never 0 or 1.
MINIVLLM_INLINE Vec gumbel(UVec word) {
    const Vec u = (signed_to_float(shift_right<9>(word)) + set1(0.5f)) * set1(0x1p-23f);
    return zero() - log(zero() - log(u));
}
constexpr float kMostGumbel = 16.64f;  // above -log(-log(1 - 2^-24)) = 16.6355

// At least gumbel(word), by a tenth of the work: -log u >= 1 - u, and a float's bits, as a number, are 2^23 (127 + its
// logarithm to base 2) at most.
MINIVLLM_INLINE Vec most_gumbel(UVec word) {
    const Vec rest = set1(0x1p23f - 0.5f) - signed_to_float(shift_right<9>(word));  // 2^23 (1 - u), exactly
    constexpr float kLog2 = 0.693147181f;
    return fma(signed_to_float(bits_of(rest)), set1(-kLog2 * 0x1p-23f), set1(150 * kLog2 + 1e-4f));
}

// What one row's noise is a function of, besides the vocabulary index.
struct NoiseSource {
    PhiloxKey key;
    uint32_t position_low, position_high, purpose;
};

constexpr int kGroup = 4 * kLanes;  // vocabulary indices that two vectors of counters serve

// The random words of the vocabulary indices [first, first + kGroup), first a multiple of 4, in order.
MINIVLLM_INLINE void words_of_group(UVec (&words)[4], const NoiseSource& source, int64_t first) {
    // Of each two 64-bit lanes the first take the counters of the first half, so that unpacking leaves words in order.
    static constexpr uint32_t avx512_order[16] = {0, 0, 4, 0, 1, 0, 5, 0, 2, 0, 6, 0, 3, 0, 7, 0};
    static constexpr uint32_t avx2_order[8] = {0, 0, 2, 0, 1, 0, 3, 0};
    const UVec order = uload(kLanes == 16 ? avx512_order : avx2_order);
    for (int half = 0; half < 2; ++half) {
        UVec c[4] = {uset1(uint32_t(first / 4 + half * kLanes / 2)) + order, uset1(source.position_low),
                     uset1(source.position_high), uset1(source.purpose)};
        philox(c, source.key);
        const UVec low = join(c[0], c[1]), high = join(c[2], c[3]);
        words[2 * half] = unpack_low64(low, high);
        words[2 * half + 1] = unpack_high64(low, high);
    }
}

// ---- Gumbel-max sampling ----

struct SampledRow {
    NoiseSource noise;
    float temperature;
};

float perturbed(const SampledRow& row, float logit, int64_t index) {
    UVec words[4];
    const int64_t first = index / kGroup * kGroup;
    words_of_group(words, row.noise, first);
    float lanes[kGroup], sum[kLanes];
    for (int i = 0; i < 4; ++i) store(lanes + i * kLanes, gumbel(words[i]));
    store(sum, set1(logit) / set1(row.temperature) + set1(lanes[index - first]));
    return sum[0];
}

// Below it nothing counts that is quick to find and at least what it stands for, the error of a product with the
// temperature's reciprocal included.
float slightly_below(float value) { return value - (1e-3f + 1e-6f * __builtin_fabsf(value)); }

// The best of `best` and a chunk x[0, n) that starts at vocabulary index `begin`. What cannot reach the best so far, or
// `floor`, which some token of the row is known to have, even with the most its noise can be, is passed over: that
// changes no row's result.
Peak best_perturbed(const SampledRow& row, const float* x, int64_t n, int64_t begin, Peak best, float floor) {
    const Vec temperature = set1(row.temperature), reciprocal = set1(1.0f / row.temperature);
    const bool can_skip = 1.0f / row.temperature < kInfinity;
    const auto least = [&] { return can_skip ? slightly_below(best.value > floor ? best.value : floor) : -kInfinity; };
    Vec bound = set1(least());
    for (int64_t i = 0; i < n; i += kGroup) {
        Vec logits[4];
        uint32_t possible = 0;
        for (int c = 0; c < 4; ++c) {
            const int64_t left = n - i - c * kLanes;
            const int width = left < 0 ? 0 : left < kLanes ? int(left) : kLanes;
            logits[c] = width == kLanes ? load(x + i + c * kLanes)
                        : width == 0    ? set1(-kInfinity)
                                        : load_first(x + i + c * kLanes, width, -kInfinity);
            possible |= lanes_not_less(fma(logits[c], reciprocal, set1(kMostGumbel)), bound);
        }
        if (possible == 0) continue;
        UVec words[4];
        words_of_group(words, row.noise, begin + i);
        for (int c = 0; c < 4; ++c) {
            if (lanes_not_less(fma(logits[c], reciprocal, most_gumbel(words[c])), bound) == 0) continue;
            const Vec value = logits[c] / temperature + gumbel(words[c]);
            if (lanes_at_least(value, set1(best.value)) == 0) continue;
            const float top = reduce_max(value);
            const uint32_t lanes = lanes_equal(value, set1(top));
            if (lanes == 0) continue;  // NaN
            const Peak peak{top, begin + i + c * kLanes + __builtin_ctz(lanes)};
            if (beats(peak, best)) best = peak;
            bound = set1(least());
        }
    }
    return best;
}

// Of a chunk of logits.
constexpr uint8_t kBroken = 1, kAlive = 2;  // holds a NaN or +inf; something above -inf

Peak peak_of(const float* x, int64_t n, int64_t begin, uint8_t& state) {
    Vec most = set1(-kInfinity);
    uint32_t below_infinity = kAllLanes;  // false for a NaN too
    for_vectors(x, n, [&](Vec v, int64_t) {
        below_infinity &= lanes_less(v, set1(kInfinity));
        most = max(v, most);
    });
    const float value = reduce_max(most);
    state = uint8_t((below_infinity == kAllLanes ? 0 : kBroken) | (value > -kInfinity ? kAlive : 0));
    return {value, begin + first_index_of(value, x, n)};
}

// The largest so far of a row, as far as other threads have said: a hint, which changes how much is computed and no result.
struct Floor {
    float value;

    float get() const {
        float known;
        __atomic_load(&value, &known, __ATOMIC_RELAXED);
        return known;
    }
    void raise(float to) {
        float known = get();
        while (known < to &&
               !__atomic_compare_exchange(&value, &known, &to, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
};

// Each chunk is read from memory once: for its peak, from which its own search starts, and again while it is near.
void gumbel_argmax(int64_t* out, uint8_t* broken, const Logits& logits, const float* temperature,
                   const uint64_t* seeds, const uint64_t* positions, uint32_t purpose) {
    const Chunks chunks{logits.data, logits.num_rows, logits.vocab_size, logits.row_stride};
    const size_t num_chunks = size_t(chunks.count()), num_rows = size_t(logits.num_rows);
    auto* peaks = static_cast<Peak*>(
        thread_scratch(0, num_chunks * (sizeof(Peak) + 1) + num_rows * sizeof(Floor)));
    auto* floors = reinterpret_cast<Floor*>(peaks + num_chunks);
    auto* states = reinterpret_cast<uint8_t*>(floors + num_rows);
    for (int64_t r = 0; r < logits.num_rows; ++r) floors[r].value = -kInfinity;
    parallel_tasks(chunks.count(), [&](int64_t i) {
        const int64_t r = chunks.row(i), n = chunks.size(i);
        const float* x = chunks.data(i);
        Peak& peak = peaks[i];
        peak = peak_of(x, n, chunks.begin(i), states[i]);
        if (!(temperature[r] > 0) || states[i] != kAlive) return;
        const SampledRow row{{{uint32_t(seeds[r]), uint32_t(seeds[r] >> 32)},
                              uint32_t(positions[r]), uint32_t(positions[r] >> 32), purpose}, temperature[r]};
        peak.value = perturbed(row, peak.value, peak.index);
        peak = best_perturbed(row, x, n, chunks.begin(i), peak, floors[r].get());
        floors[r].raise(peak.value);
    });
    for (int64_t r = 0; r < logits.num_rows; ++r) {
        const int64_t first = r * chunks.per_row();
        Peak best = peaks[first];
        uint8_t state = states[first];
        for (int64_t i = first + 1; i < first + chunks.per_row(); ++i) {
            if (beats(peaks[i], best)) best = peaks[i];
            state |= states[i];
        }
        out[r] = best.index;
        broken[r] = state != kAlive;
    }
}

// ---- truncation ----

// An entry of a row that may survive. The order is by value, largest first, then by index: all are distinct.
struct Candidate {
    float value;
    int32_t index;
    float weight;
};

MINIVLLM_INLINE bool precedes(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

MINIVLLM_INLINE void swap(Candidate& a, Candidate& b) {
    const Candidate t = a;
    a = b;
    b = t;
}

void insertion_sort(Candidate* c, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const Candidate moved = c[i];
        int64_t j = i;
        for (; j > 0 && precedes(moved, c[j - 1]); --j) c[j] = c[j - 1];
        c[j] = moved;
    }
}

// Puts those that precede a pivot before it; returns its place. The pivot is random-like but fixed by n.
int64_t partition(Candidate* c, int64_t n) {
    swap(c[uint64_t(n) * 0x9e3779b97f4a7c15u % uint64_t(n)], c[n - 1]);
    int64_t place = 0;
    for (int64_t i = 0; i + 1 < n; ++i)
        if (precedes(c[i], c[n - 1])) swap(c[i], c[place++]);
    swap(c[place], c[n - 1]);
    return place;
}

// The first candidate, in order, at which the weights so far reach `target`; the last if none does. A quickselect
// by weight: expected time O(n).
Candidate reach(Candidate* c, int64_t n, double target) {
    double sum = 0;
    while (n > 16) {
        const int64_t place = partition(c, n);
        double before = sum;
        for (int64_t i = 0; i < place; ++i) before += c[i].weight;
        if (place > 0 && before >= target) {
            n = place;
        } else if (before + c[place].weight >= target || place + 1 == n) {
            return c[place];
        } else {
            sum = before + c[place].weight;
            c += place + 1;
            n -= place + 1;
        }
    }
    insertion_sort(c, n);
    for (int64_t i = 0; i < n; ++i) {
        sum += c[i].weight;
        if (sum >= target) return c[i];
    }
    return c[n - 1];
}

// The entries of at least `bound`, in the order of their index, with weight 1.
int64_t collect(Candidate* to, const float* x, int64_t n, float bound) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const int width = n - i < kLanes ? int(n - i) : kLanes;
        uint32_t found = lanes_at_least(load_partial(x + i, width), set1(bound)) & ((1u << width) - 1);
        for (; found != 0; found &= found - 1) {
            const int64_t index = i + __builtin_ctz(found);
            to[count++] = {x[index], int32_t(index), 1.0f};
        }
    }
    return count;
}

void weigh(Candidate* c, int64_t n, float top) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int width = n - i < kLanes ? int(n - i) : kLanes;
        float lanes[kLanes] = {};
        for (int l = 0; l < width; ++l) lanes[l] = c[i + l].value - top;
        store(lanes, exp(load(lanes)));
        for (int l = 0; l < width; ++l) c[i + l].weight = lanes[l];
    }
}

// The sum of e^(x - top) over the entries of at least `bound`.
double total_weight(const float* x, int64_t n, float top, float bound) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kVocabChunk) {
        const int64_t size = n - begin < kVocabChunk ? n - begin : kVocabChunk;
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        for_vectors(x + begin, size, [&](Vec v, int64_t i) {
            Vec& sum = sums[i / kLanes % 4];
            sum = sum + where_less(v, set1(bound), zero(), exp(v - set1(top)));
        });
        total += double(reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    return total;
}

constexpr int64_t kMaximaStep = 64;  // entries that share one maximum when looking for the k-th largest

// A value with at least k entries not below it: the k-th largest of the maxima of groups. -inf if there are too few.
float at_most_kth_largest(Candidate* scratch, const float* x, int64_t n, int64_t k) {
    const int64_t groups = (n + kMaximaStep - 1) / kMaximaStep;
    if (k > groups) return -kInfinity;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t left = n - g * kMaximaStep;
        scratch[g] = {largest(x + g * kMaximaStep, left < kMaximaStep ? left : kMaximaStep), int32_t(g), 1.0f};
    }
    return reach(scratch, groups, double(k)).value;
}

float kth_largest(Candidate* scratch, const float* x, int64_t n, int64_t k) {
    const float bound = at_most_kth_largest(scratch, x, n, k);
    return reach(scratch, collect(scratch, x, n, bound), double(k)).value;
}

constexpr float kLikelyDepth = 10.0f;  // most nuclei reach no deeper than e^-10 of the likeliest token

// The last entry that top-p keeps among those of at least `floor`.
Candidate end_of_nucleus(Candidate* scratch, const float* x, int64_t n, float top, float floor, float top_p) {
    const double target = double(top_p) * total_weight(x, n, top, floor);
    for (float bound : {top - kLikelyDepth, floor}) {
        if (bound < floor) continue;
        const int64_t count = collect(scratch, x, n, bound);
        weigh(scratch, count, top);
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += scratch[i].weight;
        if (sum >= target || bound == floor) return reach(scratch, count, target);
    }
    return {floor, INT32_MAX, 0.0f};
}

// Masks what comes after `last` in the order of candidates.
void mask_after(float* x, int64_t n, const Candidate& last) {
    const Vec bound = set1(last.value), masked = set1(-kInfinity);
    const int64_t tied_end = last.index + int64_t(1) < n ? last.index + int64_t(1) : n;
    int64_t i = 0;
    for (; i + kLanes <= tied_end; i += kLanes) {
        const Vec v = load(x + i);
        store(x + i, where_less(v, bound, masked, v));
    }
    for (; i < tied_end; ++i) x[i] = x[i] < last.value ? -kInfinity : x[i];
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load(x + i);
        store(x + i, where_less(bound, v, v, masked));
    }
    for (; i < n; ++i) x[i] = last.value < x[i] ? x[i] : -kInfinity;
}

bool holds_nan(const float* x, int64_t n) {
    uint32_t numbers = kAllLanes;
    for_vectors(x, n, [&](Vec v, int64_t) { numbers &= lanes_equal(v, v); });
    return numbers != kAllLanes;
}

void truncate_row(float* x, int64_t n, int64_t top_k, float top_p, float log_ratio) {
    const bool by_k = top_k > 0 && top_k < n, by_p = top_p < 1.0f, by_ratio = log_ratio != -kInfinity;
    if (!(by_k || by_p || by_ratio)) return;
    const float top = largest(x, n);
    if (top == kInfinity || top == -kInfinity || holds_nan(x, n)) return;
    auto* scratch = static_cast<Candidate*>(thread_scratch(1, size_t(n) * sizeof(Candidate)));
    float floor = top + log_ratio;
    if (by_k) {
        const float kth = kth_largest(scratch, x, n, top_k);
        floor = kth > floor ? kth : floor;
    }
    Candidate last{floor, INT32_MAX, 0.0f};
    if (by_p) last = end_of_nucleus(scratch, x, n, top, floor, top_p);
    mask_after(x, n, last);
}

void top_k_top_p_min_p(const Logits& logits, const int32_t* top_k, const float* top_p, const float* log_ratio) {
    parallel_tasks(logits.num_rows, [&](int64_t r) {
        truncate_row(logits.data + r * logits.row_stride, logits.vocab_size, top_k[r], top_p[r], log_ratio[r]);
    });
}

// ---- validity ----

void nonfinite_rows(uint8_t* out, const Logits& logits) {
    const Chunks chunks{logits.data, logits.num_rows, logits.vocab_size, logits.row_stride};
    auto* found = static_cast<uint8_t*>(thread_scratch(0, size_t(chunks.count())));
    parallel_tasks(chunks.count(), [&](int64_t i) {
        uint32_t below_infinity = kAllLanes, unmasked = 0;
        for_vectors(chunks.data(i), chunks.size(i), [&](Vec v, int64_t) {
            below_infinity &= lanes_less(v, set1(kInfinity));
            unmasked |= lanes_less(set1(-kInfinity), v);
        });
        found[i] = uint8_t((below_infinity == kAllLanes ? 0 : kBroken) | (unmasked != 0 ? kAlive : 0));
    });
    for (int64_t r = 0; r < logits.num_rows; ++r) {
        uint8_t any = 0;
        for (int64_t i = r * chunks.per_row(); i < (r + 1) * chunks.per_row(); ++i) any |= found[i];
        out[r] = any != kAlive;
    }
}

void philox_block(uint32_t* out, const uint32_t* counter, const uint32_t* key) {
    UVec c[4] = {uset1(counter[0]), uset1(counter[1]), uset1(counter[2]), uset1(counter[3])};
    philox(c, {key[0], key[1]});
    for (int i = 0; i < 4; ++i) {
        float lanes[kLanes];
        store(lanes, floats_of(c[i]));
        out[i] = float_to_bits(lanes[0]);
    }
}

}  // namespace

const SamplingKernels sampling_kernels = {&gumbel_argmax, &top_k_top_p_min_p, &nonfinite_rows, &philox_block};

}  // namespace minivllm::MINIVLLM_ISA
