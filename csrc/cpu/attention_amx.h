// The arithmetic of attention on AMX tiles: bf16 queries over keys and values that are bf16, or bytes that are
// exact in it. Included by attention.cpp only.
//
// Scores: float32 sums of bf16 products, head dimension ascending in steps of 32. Outputs: weights rounded to bf16,
// float32 sums over positions ascending in steps of 32. The order inside a step is the processor's, and the same for
// every row. A position that a row does not see has weight zero there, and adds a zero: values that are not finite
// are kept out of the tiles of which a row sees only a part.
#pragma once

#include "attention_walk.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// A code's magnitude as bf16, exactly.
constexpr uint16_t bf16_of_magnitude(KvType type, int code) {
    const int exponent = type == KvType::int8 ? 0 : code >> 3, mantissa = type == KvType::int8 ? code : code & 7;
    if (type == KvType::fp8_e4m3 && code == 0x7f) return 0x7fc0;
    if (exponent > 0) return uint16_t((127 - 7 + exponent) << 7 | mantissa << 4);
    if (mantissa == 0) return 0;
    int top = 0;
    while (mantissa >> (top + 1)) ++top;
    const int bias = type == KvType::int8 ? 127 : 127 - 9;
    return uint16_t((bias + top) << 7 | ((mantissa << 7 >> top) & 0x7f));
}

struct CodeTable {
    alignas(64) uint8_t low[128], high[128];
    constexpr explicit CodeTable(KvType type) : low(), high() {
        for (int code = 0; code < 128; ++code) {
            low[code] = uint8_t(bf16_of_magnitude(type, code) & 0xff);
            high[code] = uint8_t(bf16_of_magnitude(type, code) >> 8);
        }
    }
};

class AmxMath {
public:
    static constexpr int kExpDegree = 4;

    static size_t bytes(const Attention& a, int64_t num_rows) {
        const int64_t d = a.layout.head_dim;
        return size_t(num_rows * (d + 16) + kBlock * kStep + 2 * kStep * d + kTile * d + 512) * 2;
    }

    AmxMath() = default;
    AmxMath(const Attention& a, const Rows& rows, const State& state, char* memory)
        : a_(&a), rows_(&rows), s_(state), head_dim_(a.layout.head_dim), num_k_(int((head_dim_ + 31) / 32)) {
        const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
        q_ = reinterpret_cast<bf16*>(memory);
        weights_ = q_ + padded * num_k_ * 32;
        keys_ = weights_ + kBlock * kStep;
        values_ = keys_ + kStep * head_dim_;
        spare_ = values_ + kStep * head_dim_;
        tail_ = spare_ + kTile * head_dim_;
        is_wide_ = rows.count > kNarrow;
        is_bytes_ = a.layout.type != KvType::bf16;
        // Few rows of bf16 read as fast as memory gives: a line here and there leads on the processor's own fetching.
        fetch_step_ = is_wide_ || is_bytes_ ? 64 : 256;
        std::memset(tail_, 0, 1024);
    }

    // Queries as tiles, [rows / 16][head_dim / 32][16][32], zeros beyond head_dim.
    void start() {
        for (int64_t r = 0; r < rows_->count; ++r) {
            const bf16* from = static_cast<const bf16*>(a_->q) + rows_->token[r] * a_->q_token_stride +
                               rows_->head[r] * a_->q_head_stride;
            bf16* to = q_ + r / 16 * num_k_ * 512 + r % 16 * 32;
            for (int k = 0; k < num_k_; ++k, to += 512) {
                const int64_t n = lesser(32, head_dim_ - k * 32);
                std::memcpy(to, from + k * 32, size_t(n * 2));
                std::memset(to + n, 0, size_t((32 - n) * 2));
            }
        }
        const int rows = is_wide_ ? 16 : int(rows_->count);
        alignas(64) uint8_t config[64] = {1};  // palette; then from 16 bytes a row, from 48 rows, of each tile
        for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
        for (int t = 0; t < 5; ++t) config[48 + t] = uint8_t(rows);
        asm volatile("" ::: "memory");  // gcc believes the next line reads 8 bytes, and drops the stores to the rest
        _tile_loadconfig(config);
    }

    void finish() const { _tile_release(); }

    // Codes are widened once a step for many rows; for few, two tiles at a time, so that what is widened stays near.
    void begin_step(const Step& step) {
        is_cut_ = false;
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            keys_of_[t] = reinterpret_cast<const bf16*>(step.key[t]);
            if (is_bytes_ && is_wide_) keys_of_[t] = widen(keys_ + t * kTile * head_dim_, step.key[t]);
        }
        if (is_wide_ || !is_bytes_) read_values(step, step.first_tile, step.end_tile, 0);
    }

    void scores(const Step& step, int64_t block, int64_t) {
        for (int t = step.first_tile; t < step.end_tile; t += 2) {
            const int n = t + 1 < step.end_tile ? 2 : 1;
            const char* next[2] = {};
            for (int i = 0; i < n; ++i) {
                if (block == 0) next[i] = step.next[t + i];
                if (is_bytes_ && !is_wide_) keys_of_[t + i] = widen(keys_ + i * kTile * head_dim_, step.key[t + i]);
            }
            float* to = s_.scores + t * kTile;
            if (is_wide_)
                for (int i = 0; i < n; ++i)
                    wide_scores(to + i * kTile, block, keys_of_[t + i], step.begin + (t + i) * kTile, next[i]);
            else if (n == 2) narrow_scores<2>(to, keys_of_ + t, next);
            else narrow_scores<1>(to, keys_of_ + t, next);
        }
    }

    // Weights as tiles, [rows / 16][step's tile][16][32].
    void set_weights(int64_t r, const Vec (&x)[kStepVecs]) {
        bf16* to = weights_of(r);
        for (int t = 0; t < kStepTiles; ++t) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(x[2 * t + 1].v, x[2 * t].v);
            _mm512_store_si512(to + t * 512, reinterpret_cast<const __m512i&>(pair));
        }
    }
    void no_weights(int64_t r) {
        for (int t = 0; t < kStepTiles; ++t) _mm512_store_si512(weights_of(r) + t * 512, _mm512_setzero_si512());
    }

    void add_values(const Step& step, int64_t block, int64_t block_end) {
        if (is_wide_) {
            wide_values(step, block);
        } else if (!is_bytes_) {
            narrow_values(step, step.first_tile, step.end_tile);
        } else {
            for (int t = step.first_tile; t < step.end_tile; t += 2) {
                const int end = int(lesser(t + 2, step.end_tile));
                read_values(step, t, end, t);
                narrow_values(step, t, end);
            }
        }
        if (is_cut_) add_cut_values(step, block, block_end);
    }

private:
    // Where the values of tiles [first, end) of the step lie as bf16; own copies begin with that of tile `origin`.
    void read_values(const Step& step, int first, int end, int origin) {
        const int64_t half = a_->layout.half_bytes(), last = rows_->count - 1;
        for (int t = first; t < end; ++t) {
            const char* tile = step.key[t] + half;
            bf16* own = values_ + (t - origin) * kTile * head_dim_;
            values_of_[t] = reinterpret_cast<const bf16*>(tile);
            if (is_bytes_) values_of_[t] = widen(own, tile);
            const int64_t p = step.begin + t * kTile;
            if (rows_->begin[last] > p || rows_->end[0] < p + kTile) {
                is_cut_ |= keep_visible(own, values_of_[t], int(rows_->begin[0] - p), int(rows_->end[last] - p));
                values_of_[t] = own;
            }
        }
    }

    // While part `i` of `n` of a tile is worked on, that part of the same tile of the next step is fetched into L2.
    MINIVLLM_INLINE void fetch(const char* tile, int i, int n) const {
        if (tile == nullptr) return;
        const int64_t bytes = a_->layout.tile_bytes();
        for (int64_t at = bytes * i / n / 64 * 64; at < bytes * (i + 1) / n; at += fetch_step_)
            _mm_prefetch(tile + at, _MM_HINT_T1);
    }

    const char* next_values(const Step& step, int t) const {
        return step.next[t] == nullptr ? nullptr : step.next[t] + a_->layout.half_bytes();
    }

    bf16* weights_of(int64_t r) const { return weights_ + r / 16 * kStepTiles * 512 + r % 16 * 32; }

    // A tile of codes to bf16, exactly, in bf16's order.
    const bf16* widen(bf16* to, const char* from) const {
        static constexpr CodeTable int8(KvType::int8), fp8(KvType::fp8_e4m3);
        const CodeTable& table = a_->layout.type == KvType::int8 ? int8 : fp8;
        const __m512i low0 = _mm512_load_si512(table.low), low1 = _mm512_load_si512(table.low + 64);
        const __m512i high0 = _mm512_load_si512(table.high), high1 = _mm512_load_si512(table.high + 64);
        for (int64_t i = 0; i < kTile * head_dim_; i += 64) {
            const __m512i code = _mm512_loadu_si512(from + i);
            const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8(char(0x80)));
            const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
            const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, code, high1), sign);
            _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
            _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
        }
        return to;
    }

    // The k-th 1 KiB of 16 tokens' keys; the last may be half a one, and is completed with zeros.
    MINIVLLM_INLINE const bf16* key_rows(const bf16* group, int k) const {
        if (k * 32 + 32 <= head_dim_) return group + k * 512;
        std::memcpy(tail_, group + k * 512, 512);
        return tail_;
    }

    // A block of rows: tiles 0 to 3 hold sums, 4 and 5 queries, 6 and 7 keys.
    void wide_scores(float* to, int64_t block, const bf16* key, int64_t p, const char* next) const {
        if (!sees(block, p)) return;
        const bf16* q = q_ + block * num_k_ * 32;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < num_k_; ++k) {
            _tile_loadd(6, key_rows(key, k), 64);
            _tile_loadd(4, q + k * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, q + (num_k_ + k) * 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, key_rows(key + 16 * head_dim_, k), 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            fetch(next, k, num_k_);
        }
        _tile_stored(0, to, kStep * 4);
        _tile_stored(1, to + 16, kStep * 4);
        _tile_stored(2, to + 16 * kStep, kStep * 4);
        _tile_stored(3, to + 16 * kStep + 16, kStep * 4);
    }

    // Up to 16 rows: tiles 0 to 3 hold sums, 4 queries, 5 to 7 keys; n tiles of keys.
    template <int n>
    void narrow_scores(float* to, const bf16* const* keys, const char* const* next) const {
        const int64_t group = 16 * head_dim_;
        _tile_zero(0);
        _tile_zero(1);
        if (n == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int k = 0; k < num_k_; ++k) {
            _tile_loadd(4, q_ + k * 512, 64);
            _tile_loadd(5, key_rows(keys[0], k), 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, key_rows(keys[0] + group, k), 64);
            _tile_dpbf16ps(1, 4, 6);
            if (n == 2) {
                _tile_loadd(7, key_rows(keys[1], k), 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, key_rows(keys[1] + group, k), 64);
                _tile_dpbf16ps(3, 4, 5);
            }
            for (int i = 0; i < n; ++i) fetch(next[i], k, num_k_);
        }
        _tile_stored(0, to, kStep * 4);
        _tile_stored(1, to + 16, kStep * 4);
        if (n == 2) {
            _tile_stored(2, to + 32, kStep * 4);
            _tile_stored(3, to + 48, kStep * 4);
        }
    }

    // Whether a row of the block sees the tile at p.
    bool sees(int64_t block, int64_t p) const {
        return rows_->end[lesser(block + kBlock, rows_->count) - 1] > p && rows_->begin[block] < p + kTile;
    }

    void wide_values(const Step& step, int64_t block) const {
        const int groups = int(head_dim_ / 16);
        int first = step.first_tile, end = step.end_tile;
        while (first < end && !sees(block, step.begin + first * kTile)) ++first;
        while (first < end && !sees(block, step.begin + (end - 1) * kTile)) --end;
        float* out = s_.seg_out + block * head_dim_;
        int g = 0;
        for (; g + 2 <= groups; g += 2) wide_group<2>(out, step, first, end, g, block == 0);
        if (g < groups) wide_group<1>(out, step, first, end, g, block == 0);
    }

    // n groups of 16 dimensions from g on.
    template <int n>
    MINIVLLM_INLINE void wide_group(float* rows, const Step& step, int first, int end, int g, bool fetches) const {
        const int64_t stride = head_dim_ * 4;
        float *out = rows + g * 16, *lower = out + 16 * head_dim_;
        _tile_loadd(0, out, stride);
        _tile_loadd(2, lower, stride);
        if (n == 2) {
            _tile_loadd(1, out + 16, stride);
            _tile_loadd(3, lower + 16, stride);
        }
        for (int t = first; t < end; ++t) {
            const bf16* values = values_of_[t] + g * 512;
            _tile_loadd(6, values, 64);
            _tile_loadd(4, weights_ + t * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights_ + (kStepTiles + t) * 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (n == 2) {
                _tile_loadd(7, values + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            const char* next = fetches ? next_values(step, t) : nullptr;
            for (int i = 0; i < n; ++i) fetch(next, g + i, int(head_dim_ / 16));
        }
        _tile_stored(0, out, stride);
        _tile_stored(2, lower, stride);
        if (n == 2) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(3, lower + 16, stride);
        }
    }

    void narrow_values(const Step& step, int first, int end) const {
        const int groups = int(head_dim_ / 16);
        int g = 0;
        for (; g + 4 <= groups; g += 4) narrow_group<4>(step, first, end, g);
        for (; g < groups; ++g) narrow_group<1>(step, first, end, g);
    }

    template <int n>
    MINIVLLM_INLINE void narrow_group(const Step& step, int first, int end, int g) const {
        const int64_t stride = head_dim_ * 4;
        float* out = s_.seg_out + g * 16;
        _tile_loadd(0, out, stride);
        if (n == 4) {
            _tile_loadd(1, out + 16, stride);
            _tile_loadd(2, out + 32, stride);
            _tile_loadd(3, out + 48, stride);
        }
        for (int t = first; t < end; ++t) {
            const bf16* values = values_of_[t] + g * 512;
            _tile_loadd(4, weights_ + t * 512, 64);
            _tile_loadd(5, values, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (n == 4) {
                _tile_loadd(6, values + 512, 64);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(7, values + 1024, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, values + 1536, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
            for (int i = 0; i < n; ++i) fetch(next_values(step, t), g + i, int(head_dim_ / 16));
        }
        _tile_stored(0, out, stride);
        if (n == 4) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(2, out + 32, stride);
            _tile_stored(3, out + 48, stride);
        }
    }

    // A copy of a value tile in which only positions [from, to) of it remain, and of these, where rows differ in what
    // they see, only what is finite. Whether something of [from, to) was left out.
    bool keep_visible(bf16* to, const bf16* tile, int begin, int end) const {
        const int64_t last = rows_->count - 1;
        const bool rows_differ = rows_->end[0] != rows_->end[last] || rows_->begin[0] != rows_->begin[last];
        uint32_t cut = 0;
        for (int pair = 0; pair < 16; ++pair) {
            const int t = 2 * pair;
            const uint32_t even = t >= begin && t < end ? 0x55555555u : 0;
            const uint32_t odd = t + 1 >= begin && t + 1 < end ? 0xaaaaaaaau : 0;
            for (int64_t g = 0; g < head_dim_ / 16; ++g) {
                const int64_t at = g * 512 + pair * 32;
                const __m512i x = _mm512_loadu_si512(tile + at);
                uint32_t kept = even | odd;
                if (rows_differ) {
                    const __m512i exponent = _mm512_set1_epi16(0x7f80);
                    const uint32_t infinite = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                    cut |= kept & infinite;
                    kept &= ~infinite;
                }
                _mm512_storeu_si512(to + at, _mm512_maskz_mov_epi16(kept, x));
            }
        }
        return cut != 0;
    }

    // What keep_visible left out of tiles that rows see parts of, to the rows that do see it: they end not finite.
    void add_cut_values(const Step& step, int64_t block, int64_t block_end) {
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            const int64_t p = step.begin + t * kTile;
            const int64_t last = rows_->count - 1;
            if (rows_->begin[last] <= p && rows_->end[0] >= p + kTile) continue;
            const bf16* tile = reinterpret_cast<const bf16*>(step.key[t] + a_->layout.half_bytes());
            if (is_bytes_) tile = widen(spare_, step.key[t] + a_->layout.half_bytes());
            for (int64_t r = block; r < block_end; ++r)
                for (int64_t j = greater(rows_->begin[r] - p, 0); j < lesser(rows_->end[r] - p, kTile); ++j) {
                    const float weight = to_float(weights_of(r - block)[t * 512 + j]);
                    for (int64_t d = 0; d < head_dim_; ++d) {
                        const float value = to_float(tile[d / 16 * 512 + j / 2 * 32 + d % 16 * 2 + j % 2]);
                        if (value - value != 0) s_.seg_out[r * head_dim_ + d] += weight * value;
                    }
                }
        }
    }

    const Attention* a_ = nullptr;
    const Rows* rows_ = nullptr;
    State s_{};
    int64_t head_dim_ = 0;
    int num_k_ = 0;
    bool is_wide_ = false, is_bytes_ = false, is_cut_ = false;
    int64_t fetch_step_ = 64;
    bf16 *q_ = nullptr, *weights_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *tail_ = nullptr, *spare_ = nullptr;
    const bf16 *keys_of_[kStepTiles] = {}, *values_of_[kStepTiles] = {};  // of the step's tiles
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
