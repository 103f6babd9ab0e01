// The arithmetic of attention in float32, for every type on every instruction set. Included by attention.cpp only.
//
// A score is one chain of fma over the head dimension, ascending; an output one over positions, ascending. Masked
// positions are left out.
#pragma once

#include "attention_walk.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Register blocks: accumulators, operands and broadcasts must fit 32 registers (AVX-512) or 16 (AVX2).
constexpr int kTileVecs = kTile / kLanes;
constexpr int kScoreRows = kLanes == 16 ? 8 : 2;   // × kTileVecs accumulators
constexpr int kOutputRows = kLanes == 16 ? 4 : 2;  // × kOutputVecs accumulators
constexpr int kOutputVecs = 4;

// Eight codes as float32: what they count, exactly.
template <KvType type>
MINIVLLM_INLINE __m256 widen_codes(const uint8_t* codes) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
    __m256 x;
    if constexpr (type == KvType::int8) {
        x = _mm256_cvtepi32_ps(magnitude);
    } else {  // e4m3's bits as a float32's are 2^-120 of the value, its subnormals included; 0x7f is NaN
        x = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p120f));
        const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
        x = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000))));
    }
    return _mm256_or_ps(x, _mm256_castsi256_ps(sign));
}

// n codes to bf16, exactly, in bf16's order.
template <KvType type>
void widen_tile(bf16* to, const char* from, int64_t n) {
    for (int64_t chunk = 0; chunk < n; chunk += 64)
        for (int i = 0; i < 8; ++i) {  // [quarter][row][8] to [row][quarter][8]
            const uint8_t* codes = reinterpret_cast<const uint8_t*>(from) + chunk + i * 8;
            const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(widen_codes<type>(codes)), 16);
            const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + chunk + i % 2 * 32 + i / 2 * 8), halves);
        }
}

// Pairs of bf16 to two rows of float32, `stride` apart.
MINIVLLM_INLINE void split_pairs(float* to, int64_t stride, const bf16* pairs, int n) {
    for (int i = 0; i < n; i += kLanes) {
        const UVec bits = bits_of(load(reinterpret_cast<const float*>(pairs + 2 * i)));
        store(to + i, floats_of(shift_left<16>(bits)));
        store(to + stride + i, floats_of(shift_left<16>(shift_right<16>(bits))));
    }
}

class FmaMath {
public:
    static constexpr int64_t kBlock = 32;
    static bool may_write(const Attention&) { return false; }
    static int64_t most_heads(const Attention&) { return 1; }

    static size_t bytes(const Attention& a, int64_t num_rows) {
        return size_t(a.layout.head_dim) * size_t(4 * num_rows + 8 * kTile + 2 * kTile);
    }

    FmaMath() = default;
    FmaMath(const Attention& a, const Rows& rows, const State& state, char* memory)
        : a_(&a), rows_(&rows), s_(state), head_dim_(a.layout.head_dim) {
        q_ = reinterpret_cast<float*>(memory);
        keys_ = q_ + (rows.count + 31) / 32 * 32 * head_dim_;
        values_ = keys_ + kTile * head_dim_;
        pairs_ = reinterpret_cast<bf16*>(values_ + kTile * head_dim_);
    }

    void start() {
        with_dtype(a_->dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            for (int64_t r = 0; r < rows_->count; ++r) {
                const T* row = static_cast<const T*>(a_->q) + rows_->token[r] * a_->q_token_stride +
                               rows_->head[r] * a_->q_head_stride;
                for (int64_t d = 0; d < head_dim_; d += kLanes) store(q_ + r * head_dim_ + d, load(row + d));
            }
        });
    }

    void finish() const {}

    void begin_step(const Step&) const {}

    void scores(const Step& step, int64_t block, int64_t block_end) {
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            const int64_t p = step.begin + t * kTile;
            const int64_t first = first_that_sees(p, block, block_end), last = last_that_sees(p, block, block_end) + 1;
            if (first < last)
                score_rows(s_.scores + (first - block) * kStep + t * kTile, q_ + first * head_dim_,
                           read_keys(step.key[t]), last - first, head_dim_);
        }
    }

    static MINIVLLM_INLINE Vec weight(Vec x) { return exp2(x); }
    void look_ahead() const {}
    void set_weights(int64_t r, const Vec (&x)[kStepVecs]) {
        for (int c = 0; c < kStepVecs; ++c) store(s_.scores + r * kStep + c * kLanes, x[c]);
    }
    void no_weights(int64_t) {}

    void add_values(const Step& step, int64_t block, int64_t block_end) {
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            const int64_t p = step.begin + t * kTile;
            const int64_t first = first_that_sees(p, block, block_end), last = last_that_sees(p, block, block_end) + 1;
            const float* weights = s_.scores - block * kStep + t * kTile;
            if (first < last) add_rows(first, last, p, weights, read_values(step.key[t] + a_->layout.half_bytes()));
        }
    }

private:
    // [head_dim][32] and [32][head_dim]
    const float* read_keys(const char* tile) {
        if (a_->layout.type == KvType::f32) return reinterpret_cast<const float*>(tile);
        if (a_->layout.type == KvType::f16) return widen_halves(keys_, tile);
        const bf16* pairs = read_pairs(tile);
        for (int64_t i = 0; i < head_dim_; ++i)  // [16 tokens of them][pair of dimensions]
            split_pairs(keys_ + i % (head_dim_ / 2) * 2 * kTile + i / (head_dim_ / 2) * 16, kTile, pairs + i * 32, 16);
        return keys_;
    }
    const float* read_values(const char* tile) {
        if (a_->layout.type == KvType::f32) return reinterpret_cast<const float*>(tile);
        if (a_->layout.type == KvType::f16) return widen_halves(values_, tile);
        const bf16* pairs = read_pairs(tile);
        for (int64_t i = 0; i < head_dim_; ++i)  // [16 dimensions of them][pair of tokens]
            split_pairs(values_ + i % 16 * 2 * head_dim_ + i / 16 * 16, head_dim_, pairs + i * 32, 16);
        return values_;
    }
    const bf16* read_pairs(const char* tile) {
        if (a_->layout.type == KvType::bf16) return reinterpret_cast<const bf16*>(tile);
        if (a_->layout.type == KvType::int8) widen_tile<KvType::int8>(pairs_, tile, kTile * head_dim_);
        else widen_tile<KvType::fp8_e4m3>(pairs_, tile, kTile * head_dim_);
        return pairs_;
    }
    const float* widen_halves(float* to, const char* tile) const {
        const f16* from = reinterpret_cast<const f16*>(tile);
        for (int64_t i = 0; i < kTile * head_dim_; i += kLanes) store(to + i, load(from + i));
        return to;
    }

    // Rows ascend in position, so those that see a tile are neighbours.
    int64_t first_that_sees(int64_t p, int64_t r, int64_t end) const {
        while (r < end && rows_->end[r] <= p) ++r;
        return r;
    }
    int64_t last_that_sees(int64_t p, int64_t first, int64_t end) const {
        int64_t r = end - 1;
        while (r >= first && rows_->begin[r] >= p + kTile) --r;
        return r;
    }
    int visible_from(int64_t r, int64_t p) const { return int(greater(rows_->begin[r] - p, 0)); }
    int visible_to(int64_t r, int64_t p) const { return int(lesser(rows_->end[r] - p, kTile)); }

    template <int R>
    static MINIVLLM_INLINE void score_block(float* scores, const float* q, const float* keys, int64_t head_dim) {
        Vec acc[R][kTileVecs];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kTileVecs; ++c) acc[r][c] = zero();
        for (int64_t d = 0; d < head_dim; ++d) {
            Vec key[kTileVecs];
            for (int c = 0; c < kTileVecs; ++c) key[c] = load(keys + d * kTile + c * kLanes);
            for (int r = 0; r < R; ++r) {
                const Vec x = set1(q[r * head_dim + d]);
                for (int c = 0; c < kTileVecs; ++c) acc[r][c] = fma(x, key[c], acc[r][c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kTileVecs; ++c) store(scores + r * kStep + c * kLanes, acc[r][c]);
    }

    // scores[row][j] = q[row] · k[j]
    template <int R = kScoreRows>
    static void score_rows(float* scores, const float* q, const float* keys, int64_t rows, int64_t head_dim) {
        for (; rows >= R; rows -= R, scores += R * kStep, q += R * head_dim)
            score_block<R>(scores, q, keys, head_dim);
        if constexpr (R > 1) score_rows<R / 2>(scores, q, keys, rows, head_dim);
    }

    template <int R, int C>
    static MINIVLLM_INLINE void output_block(float* out, const float* weights, const float* values, int64_t head_dim,
                                             int j, int j_end) {
        Vec acc[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * head_dim + c * kLanes);
        for (; j < j_end; ++j) {
            Vec value[C];
            for (int c = 0; c < C; ++c) value[c] = load(values + j * head_dim + c * kLanes);
            for (int r = 0; r < R; ++r) {
                const Vec w = set1(weights[r * kStep + j]);
                for (int c = 0; c < C; ++c) acc[r][c] = fma(w, value[c], acc[r][c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store(out + r * head_dim + c * kLanes, acc[r][c]);
    }

    // out[row][d] += weights[row][j] * v[j][d] for j in [j, j_end), ascending, for R rows.
    template <int R, int C = kOutputVecs>
    static void add_positions(float* out, const float* weights, const float* values, int64_t head_dim, int j, int j_end,
                              int64_t d = 0) {
        if (j >= j_end) return;
        for (; d + C * kLanes <= head_dim; d += C * kLanes)
            output_block<R, C>(out + d, weights, values + d, head_dim, j, j_end);
        if constexpr (C > 1) add_positions<R, C / 2>(out, weights, values, head_dim, j, j_end, d);
    }

    template <int R = kOutputRows>
    void add_rows(int64_t r, int64_t last, int64_t p, const float* weights, const float* values) {
        for (; r + R <= last; r += R) add_neighbours<R>(r, p, weights, values);
        if constexpr (R > 1) add_rows<R / 2>(r, last, p, weights, values);
    }

    // R rows together where all of them see the positions, each alone before and after; ascending for each.
    template <int R>
    void add_neighbours(int64_t r, int64_t p, const float* of_row_0, const float* values) {
        float* out = s_.seg_out + r * head_dim_;
        const float* weights = of_row_0 + r * kStep;
        const int all_from = visible_from(r + R - 1, p), all_to = visible_to(r, p);
        const bool together = all_from < all_to;
        for (int i = 0; i < R; ++i)
            add_positions<1>(out + i * head_dim_, weights + i * kStep, values, head_dim_, visible_from(r + i, p),
                             together ? all_from : visible_to(r + i, p));
        if (!together) return;
        add_positions<R>(out, weights, values, head_dim_, all_from, all_to);
        for (int i = 0; i < R; ++i)
            add_positions<1>(out + i * head_dim_, weights + i * kStep, values, head_dim_, all_to,
                             visible_to(r + i, p));
    }

    const Attention* a_ = nullptr;
    const Rows* rows_ = nullptr;
    State s_{};
    int64_t head_dim_ = 0;
    float *q_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
    bf16* pairs_ = nullptr;
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
