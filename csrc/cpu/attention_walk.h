// A set of query rows walks over the keys and values of one KV head. Included by attention.cpp only.
//
// What fixes a row's bits, whatever else is computed beside it:
//   - steps of 128 absolute positions move the row's (maximum, sum, output), ascending, within segments of 1024
//     absolute positions; segments are merged in ascending order, the first one copied;
//   - within a step the order of a sum is that of `Math`, over tiles of 32 positions in ascending order;
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
constexpr int64_t kBlock = 32;      // rows that take a step together: what they need of it stays in the nearest cache
constexpr int64_t kNarrow = 16;     // a walk of no more rows touches no rows beyond them; others are padded to blocks
constexpr float kLog2e = 1.44269504f;
constexpr float kMasked = -1e30f;  // 2^(kMasked - maximum) is zero, and no infinity enters the arithmetic

MINIVLLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
MINIVLLM_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x for x <= 0 by a minimax polynomial in the fraction: relative error 3e-6 of degree 4, below 1e-7 of degree 6
// (rounding included). Zero below -126 (where AVX-512 gives subnormals, and zero from -150); NaN for NaN.
template <int degree>
MINIVLLM_INLINE Vec exp2(Vec x) {
    static_assert(degree == 4 || degree == 6);
#if !defined(__AVX512F__)
    const Vec given = x;
    x = max(set1(-126.0f), x);
#endif
    const Vec n = round_even(x), f = x - n;
    Vec p;
    if constexpr (degree == 4) {
        p = set1(0.009570102f);
        p = fma(p, f, set1(0.05591786f));
        p = fma(p, f, set1(0.24024744f));
        p = fma(p, f, set1(0.6931218f));
        p = fma(p, f, set1(0.9999993f));
    } else {
        p = set1(0.00015345812f);
        p = fma(p, f, set1(0.0013399931f));
        p = fma(p, f, set1(0.009618489f));
        p = fma(p, f, set1(0.055503286f));
        p = fma(p, f, set1(0.24022646f));
        p = fma(p, f, set1(0.6931472f));
        p = fma(p, f, set1(1.0f));
    }
#if defined(__AVX512F__)
    return {_mm512_scalef_ps(p.v, n.v)};
#else
    return where_less(given, set1(-126.0f), zero(), p * power_of_two(n));
#endif
}

// One number by the vector's arithmetic.
MINIVLLM_INLINE float exp2_one(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp2<6>(set1(x)));
    return lanes[0];
}

// The rows of a walk: query rows of one request, a position's heads side by side, or those of several.
struct Rows {
    int64_t count;
    int32_t token[kMaxRows], head[kMaxRows];       // where the query is and the output goes
    int64_t position[kMaxRows];
    int64_t begin[kMaxRows], end[kMaxRows];        // what it sees on the way: positions, ascending from row to row
    float* carried[kMaxRows];                      // its state between walks, or null
};

// What becomes of the rows at a walk's end: their output, or their state in rows.carried. A shared part may end inside
// a segment, with which its rows go on; a part is one segment of several walked at the same time, which `join` merges.
enum class Ending { output, shared, part };

struct Path {
    const int32_t* blocks;  // the table's row
    int64_t kv_head;
    int64_t begin, end;  // begin is a multiple of kStep
    bool resumes;        // from rows.carried
    Ending ending;
};

// A row's state where a walk ends: of the segments merged so far and of the one it is in.
constexpr int64_t carried_floats(int64_t head_dim) { return 2 * head_dim + 16; }

// A thread's memory for one walk.
struct State {
    float *seg_out, *seg_max, *seg_sum;  // [rows, head_dim], [rows]: the segment's running state
    float *out, *max, *sum;              // the segments merged so far
    float *scores;                       // [kBlock, kStep]: of a block's rows
    float *k_scales, *v_scales;          // [kStep]: of int8
};

// Math gives the arithmetic of one step:
//   Math(a, rows, state, memory)   with `static size_t bytes(a, num_rows)` of scratch
//   start()                        reads the rows' queries
//   begin_step(step)
//   scores(step, first, end)       state.scores = q·k for a block of rows, of the tiles that one of them sees
//   set_weights(row, x)            takes the softmax numerators of a row of the block; no_weights(row): it sees nothing
//   add_values(step, first, end)   state.seg_out += weights · v
//   finish()                       ends what start() began
//   kExpDegree                     how exact the numerators need to be
struct Step {
    int64_t begin;                    // absolute position
    int first_tile, end_tile;         // of the step, those that some row sees
    const char* key[kStepTiles];      // tiles; values lie layout.half_bytes() behind
    const char* next[kStepTiles];     // the key tiles of the step after it, or null: to be prefetched
};

template <class Math>
class Walk {
public:
    static size_t bytes(const Attention& a, int64_t num_rows) {
        const int64_t padded = (num_rows + kBlock - 1) / kBlock * kBlock;
        return size_t(padded * (2 * a.layout.head_dim + 4) + (kBlock + 2) * kStep + 64) * 4 + Math::bytes(a, padded);
    }

    Walk(const Attention& a, const Rows& rows) : a_(a), rows_(rows), head_dim_(a.layout.head_dim) {
        char* memory = static_cast<char*>(thread_scratch(1, bytes(a, rows.count)));
        const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
        float* p = reinterpret_cast<float*>(memory);
        auto take = [&p](int64_t n) { float* taken = p; p += n; return taken; };
        s_.seg_out = take(padded * head_dim_), s_.out = take(padded * head_dim_), s_.scores = take(kBlock * kStep);
        s_.k_scales = take(kStep), s_.v_scales = take(kStep);
        for (float** each : {&s_.seg_max, &s_.seg_sum, &s_.max, &s_.sum}) *each = take(padded);
        math_ = Math(a, rows, s_, reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64));
    }

    // next: where this thread will probably go on, or null.
    void run(const Path& path, const Path* next) {
        path_ = path;
        next_path_ = next;
        math_.start();
        const int64_t first = path.resumes ? path.begin : greater(path.begin, rows_.begin[0] / kStep * kStep);
        if (path.resumes) resume();
        for (int64_t segment = first / kSegment * kSegment; segment < path.end; segment += kSegment) {
            if (segment >= first || !path.resumes) start_segment();
            const int64_t segment_end = lesser(segment + kSegment, path.end);
            for (int64_t p = greater(segment, first); p < segment_end; p += kStep) add_step(p);
            if (path.ending != Ending::shared || segment + kSegment <= path.end)
                merge_segment(segment, segment + kSegment);
        }
        if (path.ending == Ending::output) store_output();
        else leave();
        math_.finish();
    }

    // The output of rows whose segments were walked apart: their states lie from rows.carried on, `stride` apart.
    void join(int64_t num_parts, int64_t stride) {
        for (int64_t r = 0; r < rows_.count; ++r)
            for (int64_t part = 0; part < num_parts; ++part) {
                const float* from = rows_.carried[r] + part * stride;
                const float* numbers = from + 2 * head_dim_;
                s_.seg_max[r] = numbers[0], s_.seg_sum[r] = numbers[1];
                std::memcpy(s_.seg_out + r * head_dim_, from, size_t(head_dim_ * 4));
                if (part == 0) copy_segment(r);
                else merge_row(r);
            }
        store_output();
    }

private:
    const char* key_tile(const Path& path, int64_t position) const {
        const int64_t size = a_.layout.block_size;
        return a_.kv_cache + a_.layout.key_tile(path.blocks[position / size], path.kv_head, position % size);
    }

    void start_segment() {
        const int64_t num_rows = rows_.count > kNarrow ? (rows_.count + kBlock - 1) / kBlock * kBlock : rows_.count;
        std::memset(s_.seg_out, 0, size_t(num_rows * head_dim_ * 4));
        for (int64_t r = 0; r < rows_.count; ++r) s_.seg_max[r] = kMasked, s_.seg_sum[r] = 0;
    }

    void add_step(int64_t begin) {
        Step step{begin, 0, kStepTiles, {}, {}};
        const int64_t end = lesser(begin + kStep, path_.end);
        step.end_tile = int((end - begin + kTile - 1) / kTile);
        if (rows_.begin[0] > begin) step.first_tile = int((rows_.begin[0] - begin) / kTile);
        for (int t = step.first_tile; t < step.end_tile; ++t) step.key[t] = key_tile(path_, begin + t * kTile);
        find_next(step);
        if (a_.layout.type == KvType::int8) load_scales(step);
        math_.begin_step(step);
        for (int64_t block = 0; block < rows_.count; block += kBlock) {
            const int64_t block_end = lesser(block + kBlock, rows_.count);
            if (rows_.end[block_end - 1] <= begin || rows_.begin[block] >= begin + kStep) continue;
            math_.scores(step, block, block_end);
            for (int64_t r = block; r < block_end; ++r) weigh(r, r - block, begin);
            math_.add_values(step, block, block_end);
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
        for (int t = 0; t < kStepTiles && p < path->end; ++t, p += kTile) step.next[t] = key_tile(*path, p);
    }

    void load_scales(const Step& step) {
        const int64_t data = a_.layout.data_bytes(), half = a_.layout.half_bytes();
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            std::memcpy(s_.k_scales + t * kTile, step.key[t] + data, kTile * 4);
            std::memcpy(s_.v_scales + t * kTile, step.key[t] + half + data, kTile * 4);
        }
    }

    // Scores to softmax numerators; the row's maximum and sum move on, and its output is brought to the new maximum.
    void weigh(int64_t r, int64_t row_of_block, int64_t begin) {
        const int from = int(greater(rows_.begin[r] - begin, 0));
        const int to = int(lesser(rows_.end[r] - begin, kStep));
        if (from >= to) return math_.no_weights(row_of_block);
        const float* scores = s_.scores + row_of_block * kStep;
        const bool is_plain = a_.softcap == 0 && a_.alibi == nullptr && a_.layout.type != KvType::int8;
        Vec x[kStepVecs];
        for (int c = 0; c < kStepVecs; ++c) x[c] = load(scores + c * kLanes);
        float scale = a_.scale * a_.k_scale * kLog2e;
        if (!is_plain) {
            finish_scores(x, r, begin);
            scale = 1;
        }
        if (from > 0 || to < kStep)
            for (int c = 0; c < kStepVecs; ++c) {
                const Vec j = lane_numbers() + set1(float(c * kLanes));
                const Vec seen = where_less(j, set1(float(to)), x[c], set1(kMasked));
                x[c] = where_less(j, set1(float(from)), set1(kMasked), seen);
            }
        Vec largest[4] = {x[0], x[1], x[2], x[3]};
        for (int c = 4; c < kStepVecs; ++c) largest[c % 4] = max(x[c], largest[c % 4]);
        const float step_max = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3]))) * scale;
        const float new_max = step_max > s_.seg_max[r] ? step_max : s_.seg_max[r];
        const float kept = s_.seg_max[r] == new_max ? 1.0f : exp2_one(s_.seg_max[r] - new_max);
        Vec total[2] = {zero(), zero()};
        for (int c = 0; c < kStepVecs; ++c) {
            x[c] = exp2<Math::kExpDegree>(fma(x[c], set1(scale), set1(-new_max)));
            total[c % 2] = total[c % 2] + x[c];
        }
        if (a_.layout.type == KvType::int8)
            for (int c = 0; c < kStepVecs; ++c)
                if (c * kLanes < to && (c + 1) * kLanes > from) x[c] = scaled_values(x[c], c, from, to);
        math_.set_weights(row_of_block, x);
        s_.seg_sum[r] = s_.seg_sum[r] * kept + reduce_add(total[0] + total[1]);
        s_.seg_max[r] = new_max;
        if (kept != 1.0f) {
            float* out = s_.seg_out + r * head_dim_;
            for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, load(out + d) * set1(kept));
        }
    }

    // A weight counts its value's codes; what an unwritten slot has for a scale must not touch a weight of zero.
    Vec scaled_values(Vec x, int c, int from, int to) const {
        const Vec j = lane_numbers() + set1(float(c * kLanes)), scaled = x * load(s_.v_scales + c * kLanes);
        return where_less(j, set1(float(from)), x, where_less(j, set1(float(to)), scaled, x));
    }

    // Scores times log2 e, with all that is not a mere factor.
    void finish_scores(Vec (&x)[kStepVecs], int64_t r, int64_t begin) const {
        for (int c = 0; c < kStepVecs; ++c) {
            Vec score = x[c] * set1(a_.scale * a_.k_scale);
            if (a_.layout.type == KvType::int8) score = score * load(s_.k_scales + c * kLanes);
            if (a_.softcap != 0) score = set1(a_.softcap) * tanh(score / set1(a_.softcap));
            if (a_.alibi != nullptr) {
                const float distance = float(begin + c * kLanes - rows_.position[r]);
                score = fma(set1(a_.alibi[rows_.head[r]]), lane_numbers() + set1(distance), score);
            }
            x[c] = score * set1(kLog2e);
        }
    }

    void merge_segment(int64_t begin, int64_t end) {
        for (int64_t r = 0; r < rows_.count; ++r) {
            if (rows_.begin[r] >= end || rows_.end[r] <= begin) continue;
            if (rows_.begin[r] >= begin) copy_segment(r);
            else merge_row(r);
        }
    }

    void copy_segment(int64_t r) {
        s_.max[r] = s_.seg_max[r];
        s_.sum[r] = s_.seg_sum[r];
        std::memcpy(s_.out + r * head_dim_, s_.seg_out + r * head_dim_, size_t(head_dim_ * 4));
    }

    void merge_row(int64_t r) {
        const float larger = s_.seg_max[r] > s_.max[r] ? s_.seg_max[r] : s_.max[r];
        const float ours = exp2_one(s_.max[r] - larger), theirs = exp2_one(s_.seg_max[r] - larger);
        s_.sum[r] = s_.sum[r] * ours + s_.seg_sum[r] * theirs;
        s_.max[r] = larger;
        float *out = s_.out + r * head_dim_, *seg = s_.seg_out + r * head_dim_;
        for (int64_t d = 0; d < head_dim_; d += kLanes)
            store(out + d, fma(load(seg + d), set1(theirs), load(out + d) * set1(ours)));
    }

    // What a row needs to go on, or to be joined.
    void leave() {
        for (int64_t r = 0; r < rows_.count; ++r) {
            float* to = rows_.carried[r];
            std::memcpy(to, s_.out + r * head_dim_, size_t(head_dim_ * 4));
            std::memcpy(to + head_dim_, s_.seg_out + r * head_dim_, size_t(head_dim_ * 4));
            const float numbers[4] = {s_.max[r], s_.sum[r], s_.seg_max[r], s_.seg_sum[r]};
            std::memcpy(to + 2 * head_dim_, numbers, sizeof numbers);
        }
    }

    void resume() {
        for (int64_t r = 0; r < rows_.count; ++r) {
            const float* from = rows_.carried[r];
            std::memcpy(s_.out + r * head_dim_, from, size_t(head_dim_ * 4));
            std::memcpy(s_.seg_out + r * head_dim_, from + head_dim_, size_t(head_dim_ * 4));
            const float* numbers = from + 2 * head_dim_;
            s_.max[r] = numbers[0], s_.sum[r] = numbers[1], s_.seg_max[r] = numbers[2], s_.seg_sum[r] = numbers[3];
        }
    }

    void store_output() {
        with_dtype(a_.dtype, [&](auto tag) { store_output_as<typename decltype(tag)::type>(); });
    }

    template <class T>
    void store_output_as() {
        for (int64_t r = 0; r < rows_.count; ++r) {
            float sum = s_.sum[r], kept = 1;
            if (a_.sinks != nullptr) {
                const float sink = a_.sinks[rows_.head[r]] * kLog2e;
                const float larger = sink > s_.max[r] ? sink : s_.max[r];
                kept = exp2_one(s_.max[r] - larger);
                sum = sum * kept + exp2_one(sink - larger);
            }
            const Vec factor = set1(kept * a_.v_scale / sum);
            T* to = static_cast<T*>(a_.out) + (rows_.token[r] * a_.num_heads + rows_.head[r]) * head_dim_;
            for (int64_t d = 0; d < head_dim_; d += kLanes) store(to + d, load(s_.out + r * head_dim_ + d) * factor);
        }
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
