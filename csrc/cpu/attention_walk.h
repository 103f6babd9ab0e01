// A set of query rows walks over the keys and values of one KV head. Included by attention.cpp only.
//
// What fixes a row's bits, whatever else is computed beside it:
//   - steps of 128 absolute positions move the row's (maximum, sum, output), ascending, within segments of 1024
//     absolute positions; segments are merged in ascending order, the first one copied;
//   - the maximum is what weights are relative to: it moves to a step's own when that is larger by more than kRise, the
//     weights' logarithm to base 2;
//   - within a step the order of a sum is that of `Math`, over tiles of 32 positions in ascending order; a sum of
//     weights is one a lane, position modulo kLanes, over a segment, and then folded;
//   - a masked position has weight zero, and what it holds is not looked at.
// Rows share loads but no arithmetic.
#pragma once

#include "attention.h"
#include "isa.h"
#include "thread_pool.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int kTile = int(kKvTile);
constexpr int kStepTiles = int(kStep) / kTile;
constexpr int kStepVecs = int(kStep) / kLanes;
constexpr int64_t kMaxRows = 256;  // of a walk
constexpr int64_t kMostHeads = 8;  // KV heads of a walk
constexpr float kLog2e = 1.44269504f;
constexpr float kMasked = -1e30f;  // 2^(kMasked - maximum) is zero, and no infinity enters the arithmetic
// Weights may be up to 2^kRise: then a row's output and sum are hardly ever brought to a new maximum.
constexpr float kRise = 8;
// From such a maximum on, by magnitude, products are rounded before it is subtracted, as it was: what fma would keep of
// their ends is no longer small, and the largest weight, 2^0, would be infinite or zero.
constexpr float kRoundedFrom = 1 << 28;

MINIVLLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
MINIVLLM_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x for x <= kRise by a minimax polynomial in the fraction: relative error below 1e-7 (rounding included), and
// exact for whole x. Zero below -126 (where AVX-512 without AMX gives subnormals, and zero from -150); NaN for NaN.
MINIVLLM_INLINE Vec exp2(Vec x) {
#if !defined(__AVX512F__)
    const Vec given = x;
    x = max(set1(-126.0f), x);
#endif
    const Vec n = round_even(x), f = x - n;
    Vec p = set1(0.00015345812f);
    p = fma(p, f, set1(0.0013399931f));
    p = fma(p, f, set1(0.009618489f));
    p = fma(p, f, set1(0.055503286f));
    p = fma(p, f, set1(0.24022646f));
    p = fma(p, f, set1(0.6931472f));
    p = fma(p, f, set1(1.0f));
#if defined(__AVX512F__)
    return {_mm512_scalef_ps(p.v, n.v)};
#else
    return where_less(given, set1(-126.0f), zero(), p * power_of_two(n));
#endif
}

// One number by the vector's arithmetic.
MINIVLLM_INLINE float exp2_one(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp2(set1(x)));
    return lanes[0];
}

// The rows of a walk: query rows of one request, a position's heads side by side, or those of several. All read one KV
// head; or, where Math takes several, consecutive ones, `per_head` rows each, and all see the same positions.
struct Rows {
    int64_t count, per_head;
    int32_t token[kMaxRows], head[kMaxRows];       // where the query is and the output goes
    int64_t position[kMaxRows];
    int64_t begin[kMaxRows], end[kMaxRows];        // what it sees on the way: positions, ascending from row to row
    float* carried[kMaxRows];                      // its state between walks, or null
    const KvWrite* write = nullptr;                // of the last position's keys and values, all rows being of its token
};

// What becomes of the rows at a walk's end: their output, or their state in rows.carried. A shared part may end inside
// a segment, with which its rows go on; a part is one segment of several walked at the same time, which `join` merges.
enum class Ending { output, shared, part };

struct Path {
    const int32_t* blocks;  // the table's row
    int64_t kv_head;
    int64_t begin, end;  // begin is a multiple of kTile, and of kStep where the path resumes
    bool resumes;        // from rows.carried
    Ending ending;
};

// A row's state where a walk ends, of the segments merged so far and of the one it is in: output, segment's output,
// segment's sums [kLanes], maximum, sum, segment's maximum. What there is of them depends on the position alone.
constexpr int64_t carried_floats(int64_t head_dim) { return 2 * head_dim + 32; }

struct CarriedRow {
    float *out, *seg_out, *seg_sum, *max, *sum, *seg_max;
    CarriedRow(float* p, int64_t head_dim)
        : out(p), seg_out(p + head_dim), seg_sum(p + 2 * head_dim), max(seg_sum + kLanes), sum(max + 1),
          seg_max(max + 2) {}

    static bool has_merged(int64_t position) { return position >= kSegment; }
    static bool has_open(int64_t position) { return position % kSegment != 0; }
};

// Whether keys and values count in scales of their own, a token each.
MINIVLLM_INLINE bool has_scales(const Attention& a) { return a.layout.type == KvType::int8; }

// Whether the scores of a step need no more than a factor, of their key's where that has a scale.
MINIVLLM_INLINE bool is_plain(const Attention& a) { return a.softcap == 0 && a.alibi == nullptr; }

// What a product of query and key is multiplied by: to be a score times log2 e where scores are plain, else a score.
MINIVLLM_INLINE float score_factor(const Attention& a) { return a.scale * a.k_scale * (is_plain(a) ? kLog2e : 1); }

// Scores times log2 e, of those that are not plain. c: which vector of the step; distance: from the row's position to
// the step's first.
MINIVLLM_INLINE Vec finished_score(const Attention& a, Vec x, Vec factor, int c, int64_t head, int64_t distance) {
    Vec score = x * factor;
    if (a.softcap != 0) score = set1(a.softcap) * tanh(score / set1(a.softcap));
    if (a.alibi != nullptr)
        score = fma(set1(a.alibi[head]), lane_numbers() + set1(float(distance + c * kLanes)), score);
    return score * set1(kLog2e);
}

// x where the row sees the position: [from, to) of the step.
MINIVLLM_INLINE Vec where_seen(Vec x, int c, int from, int to, Vec otherwise) {
    const Vec j = lane_numbers() + set1(float(c * kLanes));
    return where_less(j, set1(float(from)), otherwise, where_less(j, set1(float(to)), x, otherwise));
}

// A weight counts its value's codes; what an unwritten slot has for a scale must not touch a weight of zero.
MINIVLLM_INLINE Vec scaled_weight(Vec x, int c, int from, int to, const float* v_scales) {
    return where_seen(x * load(v_scales + c * kLanes), c, from, to, x);
}

// Of a tile with scales, [kTile]: what its keys' products are multiplied by, and what its values' codes count in.
MINIVLLM_INLINE void load_scales(const Attention& a, const char* key_tile, float* factors, float* v_scales) {
    const char* k_scales = key_tile + a.layout.data_bytes();
    const Vec factor = set1(score_factor(a));
    for (int i = 0; i < kTile; i += kLanes)
        store(factors + i, load(reinterpret_cast<const float*>(k_scales) + i) * factor);
    std::memcpy(v_scales, k_scales + a.layout.half_bytes(), kTile * 4);
}

// What a row has over whole segments takes in one more.
MINIVLLM_INLINE void merge_segment(float* out, float& max, float& sum, const float* seg_out, float seg_max,
                                   float seg_sum, int64_t head_dim) {
    const float larger = seg_max > max ? seg_max : max;
    const float ours = exp2_one(max - larger), theirs = exp2_one(seg_max - larger);
    sum = sum * ours + seg_sum * theirs;
    max = larger;
    for (int64_t d = 0; d < head_dim; d += kLanes)
        store(out + d, fma(load(seg_out + d), set1(theirs), load(out + d) * set1(ours)));
}

MINIVLLM_INLINE void store_narrowed(float* to, Vec x) { store(to, x); }
MINIVLLM_INLINE void store_narrowed(f16* to, Vec x) { store(to, x); }
MINIVLLM_INLINE void store_narrowed(bf16* to, Vec x) {
#if defined(__AVX512BF16__)  // subnormals become zero
    const __m256bh narrow = _mm512_cvtneps_pbh(x.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(narrow));
#else
    store(to, x);
#endif
}

// A row's output: out / sum, with the head's sink.
template <class T>
MINIVLLM_INLINE void store_output(const Attention& a, int64_t token, int64_t head, const float* out, float max,
                                  float sum) {
    float kept = 1;
    if (a.sinks != nullptr) {
        const float sink = a.sinks[head] * kLog2e;
        const float larger = sink > max ? sink : max;
        kept = exp2_one(max - larger);
        sum = sum * kept + exp2_one(sink - larger);
    }
    const Vec factor = set1(kept * a.v_scale / sum);
    T* to = static_cast<T*>(a.out) + (token * a.num_heads + head) * a.layout.head_dim;
    for (int64_t d = 0; d < a.layout.head_dim; d += kLanes) store_narrowed(to + d, load(out + d) * factor);
}

// A thread's memory for one walk.
struct State {
    float *seg_out, *seg_max, *seg_sum;  // [rows, head_dim], [rows], [rows, kLanes]: the segment's running state
    float *out, *max, *sum;              // the segments merged so far
    float *scores;                       // [Math::kBlock, kStep]: of a block's rows
    float *factors, *v_scales;           // [KV heads, kStep]: see load_scales
};

// Math gives the arithmetic of one step:
//   Math(a, rows, state, memory)   with `static size_t bytes(a, num_rows)` of scratch
//   start()                        reads the rows' queries
//   begin_step(step)
//   scores(step, first, end)       state.scores = q·k for a block of rows, of the tiles that one of them sees
//   look_ahead()                   may fetch what is read next
//   weight(x)                      2^x, as exact as its products with the values need
//   set_weights(row, x)            takes the weights of a row of the block; no_weights(row): it sees nothing
//   add_values(step, first, end)   state.seg_out += weights · v
//   finish()                       ends what start() began
//   kBlock                         rows that take a step together: what they need of it stays in the nearest cache
//   most_heads(a)                  KV heads, at most kMostHeads, whose rows may be a block
struct Step {
    int64_t begin;                    // absolute position
    int first_tile, end_tile;         // of the step, those that some row sees
    const char* key[kStepTiles];      // tiles; values lie layout.half_bytes() behind, the next head layout.head_bytes()
    int next_first, next_end;         // of the step that this thread will probably take next; none: equal
    const char* next[kStepTiles];     // its key tiles
};

template <class Math>
class Walk {
public:
    static constexpr int64_t kBlock = Math::kBlock;

    static size_t bytes(const Attention& a, int64_t num_rows) {
        const int64_t padded = (num_rows + kBlock - 1) / kBlock * kBlock;
        return size_t(padded * (2 * a.layout.head_dim + kLanes + 3) + (kBlock + 2 * kMostHeads) * kStep + 64) * 4 +
               Math::bytes(a, padded);
    }

    Walk(const Attention& a, const Rows& rows) : a_(a), rows_(rows), head_dim_(a.layout.head_dim) {
        char* memory = static_cast<char*>(thread_scratch(1, bytes(a, rows.count)));
        const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
        float* p = reinterpret_cast<float*>(memory);
        auto take = [&p](int64_t n) { float* taken = p; p += n; return taken; };
        s_.seg_out = take(padded * head_dim_), s_.out = take(padded * head_dim_), s_.scores = take(kBlock * kStep);
        s_.factors = take(kMostHeads * kStep), s_.v_scales = take(kMostHeads * kStep);
        s_.seg_sum = take(padded * kLanes);
        for (float** each : {&s_.seg_max, &s_.max, &s_.sum}) *each = take(padded);
        math_ = Math(a, rows, s_, reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64));
    }

    // next: where this thread will probably go on, or null.
    void run(const Path& path, const Path* next) {
        path_ = path;
        next_path_ = next;
        math_.start();
        const int64_t first = path.resumes ? path.begin : greater(path.begin, rows_.begin[0]) / kStep * kStep;
        if (path.resumes) resume();
        for (int64_t segment = first / kSegment * kSegment; segment < path.end; segment += kSegment) {
            if (segment >= first || !path.resumes) start_segment();
            const int64_t segment_end = lesser(segment + kSegment, path.end);
            for (int64_t p = greater(segment, first); p < segment_end; p += kStep) add_step(p);
            if (path.ending != Ending::shared || segment + kSegment <= path.end)
                end_segment(segment, segment + kSegment);
        }
        if (path.ending == Ending::output) store_outputs();
        else leave();
        math_.finish();
    }

    // The output of rows whose segments were walked apart: their states lie from rows.carried on, `stride` apart.
    void join(int64_t num_parts, int64_t stride) {
        for (int64_t r = 0; r < rows_.count; ++r)
            for (int64_t part = 0; part < num_parts; ++part) {
                const CarriedRow from(rows_.carried[r] + part * stride, head_dim_);
                if (part == 0) copy_row(r, from.out, *from.max, *from.sum);
                else merge_row(r, from.out, *from.max, *from.sum);
            }
        store_outputs();
    }

private:
    const char* key_tile(const Path& path, int64_t position) const {
        const int64_t size = a_.layout.block_size;
        return a_.kv_cache + a_.layout.key_tile(path.blocks[position / size], path.kv_head, position % size);
    }

    void start_segment() {
        std::memset(s_.seg_out, 0, size_t(rows_.count * head_dim_ * 4));
        std::memset(s_.seg_sum, 0, size_t(rows_.count * kLanes * 4));
        for (int64_t r = 0; r < rows_.count; ++r) s_.seg_max[r] = kMasked;
    }

    void add_step(int64_t begin) {
        Step step{begin, 0, kStepTiles, {}, 0, 0, {}};
        const int64_t end = lesser(begin + kStep, path_.end);
        step.end_tile = int((end - begin + kTile - 1) / kTile);
        if (rows_.begin[0] > begin) step.first_tile = int((rows_.begin[0] - begin) / kTile);
        for (int t = step.first_tile; t < step.end_tile; ++t) step.key[t] = key_tile(path_, begin + t * kTile);
        find_next(step);
        if (has_scales(a_)) load_step_scales(step);
        math_.begin_step(step);
        for (int64_t block = 0; block < rows_.count; block += kBlock) {
            const int64_t block_end = lesser(block + kBlock, rows_.count);
            if (rows_.end[block_end - 1] <= begin || rows_.begin[block] >= begin + kStep) continue;
            math_.scores(step, block, block_end);
            for (int64_t r = block; r < block_end; ++r) weigh(r, r - block, begin);
            math_.add_values(step, block, block_end);
        }
    }

    void load_step_scales(const Step& step) {
        for (int64_t h = 0; h < rows_.count / rows_.per_head; ++h)
            for (int t = step.first_tile; t < step.end_tile; ++t) {
                const int64_t at = h * kStep + t * kTile;
                load_scales(a_, step.key[t] + h * a_.layout.head_bytes(), s_.factors + at, s_.v_scales + at);
            }
    }

    void find_next(Step& step) const {
        int64_t p = step.begin + kStep;
        const Path* path = &path_;
        if (p >= path_.end) {
            path = next_path_;
            if (path == nullptr) return;
            p = path->begin;
        }
        int t = int(p % kStep / kTile);
        step.next_first = t;
        for (; t < kStepTiles && p < path->end; ++t, p += kTile) step.next[t] = key_tile(*path, p);
        step.next_end = t;
    }

    // Scores to weights; the row's maximum and sum move on, and its output is brought to a new maximum.
    void weigh(int64_t r, int64_t row_of_block, int64_t begin) {
        const int from = int(greater(rows_.begin[r] - begin, 0));
        const int to = int(lesser(rows_.end[r] - begin, kStep));
        if (from >= to) return math_.no_weights(row_of_block);
        if (has_scales(a_)) weigh_step<true>(r, row_of_block, begin, from, to);
        else weigh_step<false>(r, row_of_block, begin, from, to);
    }

    template <bool has_scales>
    MINIVLLM_INLINE void weigh_step(int64_t r, int64_t row_of_block, int64_t begin, int from, int to) {
        auto seen = [&](Vec x, int c) { return where_seen(x, c, from, to, set1(kMasked)); };
        const float* scores = s_.scores + row_of_block * kStep;
        const int64_t head = has_scales ? r / rows_.per_head * kStep : 0;
        const float *factors = s_.factors + head, *v_scales = s_.v_scales + head;
        const bool is_cut = from > 0 || to < kStep;
        Vec x[kStepVecs], factor[kStepVecs];
        for (int c = 0; c < kStepVecs; ++c) {
            x[c] = load(scores + c * kLanes);
            factor[c] = has_scales ? load(factors + c * kLanes) : set1(score_factor(a_));
        }
        if (!is_plain(a_))
            for (int c = 0; c < kStepVecs; ++c) {
                x[c] = finished_score(a_, x[c], factor[c], c, rows_.head[r], begin - rows_.position[r]);
                factor[c] = set1(1.0f);
            }
        Vec score[kStepVecs];
        for (int c = 0; c < kStepVecs; ++c) score[c] = has_scales ? x[c] * factor[c] : x[c];
        if (is_cut)
            for (int c = 0; c < kStepVecs; ++c) score[c] = seen(score[c], c);
        Vec largest[4] = {score[0], score[1], score[2], score[3]};
        for (int c = 4; c < kStepVecs; ++c) largest[c % 4] = max(score[c], largest[c % 4]);
        float step_max = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
        if (!has_scales && is_plain(a_)) step_max *= score_factor(a_);
        math_.look_ahead();
        math_.look_ahead();
        if (step_max > s_.seg_max[r] + kRise) raise(r, step_max);
        const Vec bias = set1(-s_.seg_max[r]);
        if (!(__builtin_fabsf(s_.seg_max[r]) < kRoundedFrom))
            for (int c = 0; c < kStepVecs; ++c) x[c] = x[c] * factor[c], factor[c] = set1(1.0f);
        for (int c = 0; c < kStepVecs; ++c) x[c] = fma(x[c], factor[c], bias);
        if (is_cut)
            for (int c = 0; c < kStepVecs; ++c) x[c] = seen(x[c], c);
        Vec total[2] = {zero(), zero()};
        for (int c = 0; c < kStepVecs; ++c) {
            x[c] = math_.weight(x[c]);
            total[c % 2] = total[c % 2] + x[c];
        }
        math_.look_ahead();
        if (has_scales)
            for (int c = 0; c < kStepVecs; ++c)
                if (c * kLanes < to && (c + 1) * kLanes > from) x[c] = scaled_weight(x[c], c, from, to, v_scales);
        math_.set_weights(row_of_block, x);
        math_.look_ahead();
        float* sum = s_.seg_sum + r * kLanes;
        store(sum, load(sum) + (total[0] + total[1]));
    }

    void raise(int64_t r, float new_max) {
        const Vec kept = set1(exp2_one(s_.seg_max[r] - new_max));
        s_.seg_max[r] = new_max;
        float *sum = s_.seg_sum + r * kLanes, *out = s_.seg_out + r * head_dim_;
        store(sum, load(sum) * kept);
        for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, load(out + d) * kept);
    }

    void end_segment(int64_t begin, int64_t end) {
        for (int64_t r = 0; r < rows_.count; ++r) {
            if (rows_.begin[r] >= end || rows_.end[r] <= begin) continue;
            const float sum = reduce_add(load(s_.seg_sum + r * kLanes));
            if (rows_.begin[r] >= begin) copy_row(r, s_.seg_out + r * head_dim_, s_.seg_max[r], sum);
            else merge_row(r, s_.seg_out + r * head_dim_, s_.seg_max[r], sum);
        }
    }

    void copy_row(int64_t r, const float* out, float max, float sum) {
        s_.max[r] = max;
        s_.sum[r] = sum;
        std::memcpy(s_.out + r * head_dim_, out, size_t(head_dim_ * 4));
    }
    void merge_row(int64_t r, const float* out, float max, float sum) {
        merge_segment(s_.out + r * head_dim_, s_.max[r], s_.sum[r], out, max, sum, head_dim_);
    }

    // What a row needs to go on, or to be joined: a part is one segment, merged.
    void leave() {
        const bool has_merged = path_.ending == Ending::part || CarriedRow::has_merged(path_.end);
        const bool has_open = path_.ending == Ending::shared && CarriedRow::has_open(path_.end);
        for (int64_t r = 0; r < rows_.count; ++r) {
            const CarriedRow to(rows_.carried[r], head_dim_);
            if (has_merged) {
                std::memcpy(to.out, s_.out + r * head_dim_, size_t(head_dim_ * 4));
                *to.max = s_.max[r], *to.sum = s_.sum[r];
            }
            if (has_open) {
                std::memcpy(to.seg_out, s_.seg_out + r * head_dim_, size_t(head_dim_ * 4));
                std::memcpy(to.seg_sum, s_.seg_sum + r * kLanes, size_t(kLanes * 4));
                *to.seg_max = s_.seg_max[r];
            }
        }
    }

    void resume() {
        const bool has_merged = CarriedRow::has_merged(path_.begin), has_open = CarriedRow::has_open(path_.begin);
        for (int64_t r = 0; r < rows_.count; ++r) {
            const CarriedRow from(rows_.carried[r], head_dim_);
            if (has_merged) copy_row(r, from.out, *from.max, *from.sum);
            if (has_open) {
                std::memcpy(s_.seg_out + r * head_dim_, from.seg_out, size_t(head_dim_ * 4));
                std::memcpy(s_.seg_sum + r * kLanes, from.seg_sum, size_t(kLanes * 4));
                s_.seg_max[r] = *from.seg_max;
            }
        }
    }

    void store_outputs() {
        with_dtype(a_.dtype, [&](auto tag) {
            for (int64_t r = 0; r < rows_.count; ++r)
                store_output<typename decltype(tag)::type>(a_, rows_.token[r], rows_.head[r], s_.out + r * head_dim_,
                                                           s_.max[r], s_.sum[r]);
        });
    }

    const Attention& a_;
    const Rows& rows_;
    const int64_t head_dim_;
    Path path_{};
    const Path* next_path_ = nullptr;
    State s_{};
    Math math_;
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
