#include "sampling.h"

#include "vocab.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// ---- noise ----

struct PhiloxKey {
    uint32_t low, high;
};

// Philox4x32-10 (Salmon et al., SC 2011) of kLanes counters at once; c becomes the four words.
MINIVLLM_INLINE void philox(UVec (&c)[4], PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
        UVec high0, low0, high1, low1;
        multiply_wide(c[0], uset1(0xd2511f53), high0, low0);
        multiply_wide(c[2], uset1(0xcd9e8d57), high1, low1);
        c[0] = high1 ^ c[1] ^ uset1(key.low);
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ uset1(key.high);
        c[3] = low0;
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

// What one row's noise is a function of, besides the vocabulary index.
struct NoiseSource {
    PhiloxKey key;
    uint32_t position_low, position_high, purpose;
};

constexpr int kGroup = 4 * kLanes;  // vocabulary indices that one vector of counters serves

// The noise of the vocabulary indices [first, first + kGroup), first a multiple of 4, in order.
MINIVLLM_INLINE void noise_group(Vec (&noise)[4], const NoiseSource& source, int64_t first) {
    // Lane 4i + j takes counter j * (kLanes / 4) + i, so that unpacking the four words leaves them in order.
    static constexpr uint32_t avx512_order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    static constexpr uint32_t avx2_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    const UVec order = uload(kLanes == 16 ? avx512_order : avx2_order);
    UVec c[4] = {uset1(uint32_t(first / 4)) + order, uset1(source.position_low), uset1(source.position_high),
                 uset1(source.purpose)};
    philox(c, source.key);
    const UVec a = unpack_low32(c[0], c[1]), b = unpack_high32(c[0], c[1]);
    const UVec d = unpack_low32(c[2], c[3]), e = unpack_high32(c[2], c[3]);
    noise[0] = gumbel(unpack_low64(a, d));
    noise[1] = gumbel(unpack_high64(a, d));
    noise[2] = gumbel(unpack_low64(b, e));
    noise[3] = gumbel(unpack_high64(b, e));
}

// ---- Gumbel-max sampling ----

struct SampledRow {
    NoiseSource noise;
    float temperature;
};

float perturbed(const SampledRow& row, float logit, int64_t index) {
    Vec noise[4];
    const int64_t first = index / kGroup * kGroup;
    noise_group(noise, row.noise, first);
    float lanes[kGroup], sum[kLanes];
    for (int i = 0; i < 4; ++i) store(lanes + i * kLanes, noise[i]);
    store(sum, set1(logit) / set1(row.temperature) + set1(lanes[index - first]));
    return sum[0];
}

// The best of `floor` and a chunk x[0, n) that starts at vocabulary index `begin`. Noise is bounded, so what
// cannot reach the best so far even with the most of it is passed over: that changes no result.
Peak best_perturbed(const SampledRow& row, const float* x, int64_t n, int64_t begin, Peak best) {
    const Vec temperature = set1(row.temperature);
    for (int64_t i = 0; i < n; i += kGroup) {
        Vec scaled[4];
        uint32_t possible = 0;
        for (int c = 0; c < 4; ++c) {
            const int64_t left = n - i - c * kLanes;
            const int width = left < 0 ? 0 : left < kLanes ? int(left) : kLanes;
            const Vec v = width == kLanes ? load(x + i + c * kLanes)
                          : width == 0    ? set1(-kInfinity)
                                          : load_first(x + i + c * kLanes, width, -kInfinity);
            scaled[c] = v / temperature;
            possible |= lanes_at_least(scaled[c] + set1(kMostGumbel), set1(best.value));
        }
        if (possible == 0) continue;
        Vec noise[4];
        noise_group(noise, row.noise, begin + i);
        for (int c = 0; c < 4; ++c) {
            const Vec value = scaled[c] + noise[c];
            if (lanes_at_least(value, set1(best.value)) == 0) continue;
            const float top = reduce_max(value);
            const uint32_t lanes = lanes_equal(value, set1(top));
            if (lanes == 0) continue;  // NaN
            const Peak peak{top, begin + i + c * kLanes + __builtin_ctz(lanes)};
            if (beats(peak, best)) best = peak;
        }
    }
    return best;
}

// Each row's peak, and whether a token can be drawn from it: `chunk_peaks` and `chunk_sound` hold one of each chunk.
void find_peaks(const Chunks& chunks, Peak* chunk_peaks, uint8_t* chunk_sound, Peak* rows, uint8_t* broken) {
    parallel_tasks(chunks.count(), [&](int64_t i) {
        Vec most = set1(-kInfinity);
        uint32_t below_infinity = kAllLanes;  // false for a NaN too
        for_vectors(chunks.data(i), chunks.size(i), [&](Vec v, int64_t) {
            below_infinity &= lanes_less(v, set1(kInfinity));
            most = max(v, most);
        });
        const float value = reduce_max(most);
        chunk_peaks[i] = {value, chunks.begin(i) + first_index_of(value, chunks.data(i), chunks.size(i))};
        chunk_sound[i] = below_infinity == kAllLanes;
    });
    for (int64_t i = 0; i < chunks.count(); ++i) {
        const int64_t r = chunks.row(i);
        const bool is_first = i % chunks.per_row() == 0;
        if (is_first || beats(chunk_peaks[i], rows[r])) rows[r] = chunk_peaks[i];
        broken[r] = (is_first ? 0 : broken[r]) | !chunk_sound[i];
    }
    for (int64_t r = 0; r < chunks.num_rows; ++r) broken[r] |= rows[r].value == -kInfinity;
}

void gumbel_argmax(int64_t* out, uint8_t* broken, const Logits& logits, const float* temperature,
                   const uint64_t* seeds, const uint64_t* positions, uint32_t purpose) {
    const Chunks chunks{logits.data, logits.num_rows, logits.vocab_size, logits.row_stride};
    const size_t num_peaks = size_t(chunks.count() + logits.num_rows);
    auto* peaks = static_cast<Peak*>(thread_scratch(0, num_peaks * sizeof(Peak) + size_t(chunks.count())));
    Peak* rows = peaks + chunks.count();
    find_peaks(chunks, peaks, reinterpret_cast<uint8_t*>(peaks + num_peaks), rows, broken);
    bool any_sampled = false;
    for (int64_t r = 0; r < logits.num_rows; ++r) any_sampled |= temperature[r] > 0;
    if (!any_sampled) {
        for (int64_t r = 0; r < logits.num_rows; ++r) out[r] = rows[r].index;
        return;
    }
    auto row_of = [&](int64_t r) {
        return SampledRow{{{uint32_t(seeds[r]), uint32_t(seeds[r] >> 32)},
                           uint32_t(positions[r]), uint32_t(positions[r] >> 32), purpose}, temperature[r]};
    };
    for (int64_t r = 0; r < logits.num_rows; ++r)  // the likeliest token, perturbed, is a good bound to start from
        if (temperature[r] > 0) rows[r].value = perturbed(row_of(r), rows[r].value, rows[r].index);
    parallel_tasks(chunks.count(), [&](int64_t i) {
        const int64_t r = chunks.row(i);
        peaks[i] = temperature[r] > 0
                       ? best_perturbed(row_of(r), chunks.data(i), chunks.size(i), chunks.begin(i), rows[r])
                       : rows[r];
    });
    for (int64_t i = 0; i < chunks.count(); ++i)
        if (beats(peaks[i], rows[chunks.row(i)])) rows[chunks.row(i)] = peaks[i];
    for (int64_t r = 0; r < logits.num_rows; ++r) out[r] = rows[r].index;
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
    constexpr uint8_t broken = 1, alive = 2;  // a NaN or +inf; something above -inf
    const Chunks chunks{logits.data, logits.num_rows, logits.vocab_size, logits.row_stride};
    auto* found = static_cast<uint8_t*>(thread_scratch(0, size_t(chunks.count())));
    parallel_tasks(chunks.count(), [&](int64_t i) {
        uint32_t below_infinity = kAllLanes, unmasked = 0;
        for_vectors(chunks.data(i), chunks.size(i), [&](Vec v, int64_t) {
            below_infinity &= lanes_less(v, set1(kInfinity));
            unmasked |= lanes_less(set1(-kInfinity), v);
        });
        found[i] = uint8_t((below_infinity == kAllLanes ? 0 : broken) | (unmasked != 0 ? alive : 0));
    });
    for (int64_t r = 0; r < logits.num_rows; ++r) {
        uint8_t any = 0;
        for (int64_t i = r * chunks.per_row(); i < (r + 1) * chunks.per_row(); ++i) any |= found[i];
        out[r] = any != alive;
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
