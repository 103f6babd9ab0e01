// The arithmetic of attention on AMX tiles: bf16 queries over keys and values that are bf16, or bytes that are
// exact in it; for up to 16 rows at a time, as decoding needs it. More rows: attention_amx_wide.h, which computes the
// same. Included by attention.cpp only.
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

// 2^x for x <= kRise, within 7.5e-5 of it: a weight that is rounded to bf16 hides more. Zero below -126 beside
// FlushSubnormals; NaN for NaN.
MINIVLLM_INLINE Vec amx_weight(Vec x) {
    const Vec f{_mm512_reduce_ps(x.v, 0x09)};  // x - floor(x)
    Vec p = set1(0.07802452f);
    p = fma(p, f, set1(0.22606716f));
    p = fma(p, f, set1(0.69583356f));
    p = fma(p, f, set1(0.9999252f));
    return {_mm512_scalef_ps(p.v, x.v)};  // times 2^floor(x)
}

// While it lives, this thread's results that would be subnormal are zero: bf16 has no use for such weights, and one takes
// the processor 60 ns.
class FlushSubnormals {
public:
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushSubnormals() { _mm_setcsr(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;

private:
    const unsigned before_;
};

// How AMX reads the cache's tiles.
class AmxTiles {
public:
    static size_t bytes(const Attention& a) { return size_t(kTile * a.layout.head_dim + 512) * 2; }

    AmxTiles() = default;
    AmxTiles(const Attention& a, char* memory) : a_(&a), head_dim_(a.layout.head_dim) {
        tail_ = reinterpret_cast<bf16*>(memory);
        spare_ = tail_ + 512;
        std::memset(tail_, 0, 1024);
    }

    bool are_bytes() const { return a_->layout.type != KvType::bf16; }

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

    // A copy of a value tile in which only positions [begin, end) of it remain, and of these, where rows differ in what
    // they see, only what is finite. Whether something of [begin, end) was left out.
    bool keep_visible(bf16* to, const bf16* tile, int64_t begin, int64_t end, bool rows_differ) const {
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

    // Whether all of a value tile is: then a weight of zero keeps out what a row does not see.
    bool is_finite(const bf16* tile) const {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < kTile * head_dim_; i += 32)
            largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(tile + i), exponent));
        return _mm512_cmpeq_epi16_mask(largest, exponent) == 0;
    }

    // What keep_visible left out of a tile to a row that sees [begin, end) of it: its output ends not finite.
    void add_infinite(float* out, const bf16* weights, const char* key_tile, int64_t begin, int64_t end) const {
        const char* values = key_tile + a_->layout.half_bytes();
        const bf16* tile = are_bytes() ? widen(spare_, values) : reinterpret_cast<const bf16*>(values);
        for (int64_t j = greater(begin, 0); j < lesser(end, kTile); ++j)
            for (int64_t d = 0; d < head_dim_; ++d) {
                const float value = to_float(tile[d / 16 * 512 + j / 2 * 32 + d % 16 * 2 + j % 2]);
                if (value - value != 0) out[d] += to_float(weights[j]) * value;
            }
    }

private:
    const Attention* a_ = nullptr;
    int64_t head_dim_ = 0;
    bf16 *tail_ = nullptr, *spare_ = nullptr;
};

// A row's query as tiles' rows: [head_dim / 32] of them, 1 KiB apart, zeros beyond head_dim.
MINIVLLM_INLINE void read_query(bf16* to, const Attention& a, int64_t token, int64_t head) {
    const bf16* from = static_cast<const bf16*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    for (int64_t d = 0; d < a.layout.head_dim; d += 32, to += 512) {
        const int64_t n = lesser(32, a.layout.head_dim - d);
        if (n == 32) {
            std::memcpy(to, from + d, 64);
        } else {
            std::memcpy(to, from + d, size_t(n * 2));
            std::memset(to + n, 0, size_t((32 - n) * 2));
        }
    }
}

// A row's weights for the step's tiles, `stride` elements apart.
MINIVLLM_INLINE void round_weights(bf16* to, int64_t stride, int t, Vec left, Vec right) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(right.v, left.v);
    _mm512_storeu_si512(to + t * stride, reinterpret_cast<const __m512i&>(pair));
}

// Tiles 0 to 4 with so many rows, all 64 bytes wide.
MINIVLLM_INLINE void shape_tiles(int rows) {
    alignas(64) uint8_t config[64] = {1};  // palette; then from 16 bytes a row, from 48 rows, of each tile
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
    for (int t = 0; t < 5; ++t) config[48 + t] = uint8_t(rows);
    asm volatile("" ::: "memory");  // gcc believes the next line reads 8 bytes, and drops the stores to the rest
    _tile_loadconfig(config);
}

// What is read of the cache next is fetched, some lines a turn, from several places at once: the processor's own
// fetching follows each place only some 20 lines ahead, and a prefetch that waits for memory holds one of the few
// buffers that the core has.
template <_mm_hint kHint>
class Ahead {
public:
    static constexpr int kMostPlaces = 2 * kStepTiles;

    // `bytes` from each place on, in so many turns.
    void start(const char* const* places, int num_places, int64_t bytes, int64_t turns) {
        for (int i = 0; i < num_places; ++i) place_[i] = places[i];
        num_places_ = num_places;
        bytes_ = bytes;
        done_ = 0;
        lines_ = turns == 0 ? 0 : ((bytes + 63) / 64 + turns - 1) / turns;
    }
    void stop() { done_ = bytes_; }

    MINIVLLM_INLINE void turn() {
        for (int64_t i = 0; i < lines_ && done_ < bytes_; ++i, done_ += 64)
            for (int p = 0; p < num_places_; ++p) _mm_prefetch(place_[p] + done_, kHint);
    }

private:
    const char* place_[kMostPlaces] = {};
    int num_places_ = 0;
    int64_t bytes_ = 0, done_ = 0, lines_ = 0;  // of each place; lines a turn
};

class AmxMath {
public:
    static constexpr int64_t kBlock = 16;

    static size_t bytes(const Attention& a, int64_t num_rows) {
        const int64_t d = a.layout.head_dim;
        return size_t(num_rows * (d + 16) + kBlock * kStep + kStep * d + 2 * kTile * d + 512) * 2 + AmxTiles::bytes(a);
    }

    AmxMath() = default;
    AmxMath(const Attention& a, const Rows& rows, const State& state, char* memory)
        : a_(&a), rows_(&rows), s_(state), head_dim_(a.layout.head_dim), num_k_(int((head_dim_ + 31) / 32)) {
        q_ = reinterpret_cast<bf16*>(memory);
        weights_ = q_ + (rows.count + kBlock - 1) / kBlock * kBlock * num_k_ * 32;
        values_ = weights_ + kBlock * kStep;
        keys_ = values_ + kStep * head_dim_;
        warm_ = keys_ + 2 * kTile * head_dim_;
        tiles_ = AmxTiles(a, reinterpret_cast<char*>(warm_ + 512));
        is_bytes_ = tiles_.are_bytes();
    }

    // Queries as tiles, [rows / 16][head_dim / 32][16][32].
    void start() {
        for (int64_t r = 0; r < rows_->count; ++r)
            read_query(q_ + r / 16 * num_k_ * 512 + r % 16 * 32, *a_, rows_->token[r], rows_->head[r]);
        shape_tiles(int(lesser(rows_->count, kBlock)));
    }

    void finish() const { _tile_release(); }

    // Codes are widened two tiles at a time, so that what is widened stays near.
    void begin_step(const Step& step) {
        is_cut_ = has_values_ = false;
        for (int t = step.first_tile; t < step.end_tile; ++t) keys_of_[t] = reinterpret_cast<const bf16*>(step.key[t]);
        if (a_->layout.type == KvType::int8) fetch_scales(step);
    }

    void scores(const Step& step, int64_t block, int64_t) {
        const bf16* q = q_ + block * num_k_ * 32;
        for (int t = step.first_tile; t < step.end_tile; t += 2) {
            const int n = t + 1 < step.end_tile ? 2 : 1;
            const bool are_last = !is_bytes_ && t + 2 >= step.end_tile;
            fetch_after(step, block, (t - step.first_tile) / 2, 2 * n * num_k_ + (are_last ? kWeighTurns : 0));
            for (int i = 0; i < n && is_bytes_; ++i)
                keys_of_[t + i] = tiles_.widen(keys_ + i * kTile * head_dim_, step.key[t + i]);
            float* to = s_.scores + t * kTile;
            if (n == 2) score_tiles<2>(to, q, keys_of_ + t);
            else score_tiles<1>(to, q, keys_of_ + t);
        }
    }

    static MINIVLLM_INLINE Vec weight(Vec x) { return amx_weight(x); }
    MINIVLLM_INLINE void look_ahead() { ahead_.turn(); }

    // Weights as tiles, [step's tile][16][32].
    void set_weights(int64_t r, const Vec (&x)[kStepVecs]) {
        for (int t = 0; t < kStepTiles; ++t) round_weights(weights_ + r * 32, 512, t, x[2 * t], x[2 * t + 1]);
    }
    void no_weights(int64_t r) {
        for (int t = 0; t < kStepTiles; ++t) _mm512_store_si512(weights_ + r * 32 + t * 512, _mm512_setzero_si512());
    }

    void add_values(const Step& step, int64_t block, int64_t block_end) {
        const int groups = int(head_dim_ / 16), together = is_bytes_ ? 2 : kStepTiles;  // tiles
        int piece = num_pairs(step.first_tile, step.end_tile);
        for (int t = step.first_tile; t < step.end_tile; t += together) {
            const int end = int(lesser(t + together, step.end_tile));
            if (is_bytes_) fetch_after(step, block, piece++, (end - t) * groups);
            if (is_bytes_ || !has_values_) read_values(step, t, end, is_bytes_ ? t : 0);
            has_values_ = true;
            int g = 0;
            for (; g + 4 <= groups; g += 4) {
                if (!is_bytes_) fetch_after(step, block, piece++, 4 * (end - t));
                add_group<4>(block, t, end, g);
            }
            if (!is_bytes_ && g < groups) fetch_after(step, block, piece, (groups - g) * (end - t));
            for (; g < groups; ++g) add_group<1>(block, t, end, g);
        }
        if (is_cut_) add_cut_values(step, block, block_end);
    }

private:
    static constexpr int kWeighTurns = 8;  // of two rows, the fewest as a rule
    static constexpr int64_t kSliceBytes = kTile * 64 * 2;  // of a tile of values in bf16

    bool is_cut(int64_t p) const {
        return rows_->begin[rows_->count - 1] > p || rows_->end[0] < p + kTile;
    }

    // Where the values of tiles [first, end) of the step lie as bf16; own copies begin with that of tile `origin`.
    void read_values(const Step& step, int first, int end, int origin) {
        const int64_t half = a_->layout.half_bytes(), last = rows_->count - 1;
        const bool rows_differ = rows_->end[0] != rows_->end[last] || rows_->begin[0] != rows_->begin[last];
        for (int t = first; t < end; ++t) {
            const char* tile = step.key[t] + half;
            bf16* own = values_ + (t - origin) * kTile * head_dim_;
            values_of_[t] = is_bytes_ ? tiles_.widen(own, tile) : reinterpret_cast<const bf16*>(tile);
            const int64_t p = step.begin + t * kTile;
            if (!is_cut(p)) continue;
            is_cut_ |= tiles_.keep_visible(own, values_of_[t], rows_->begin[0] - p, rows_->end[last] - p, rows_differ);
            values_of_[t] = own;
        }
    }

    // ---- fetching ahead: of a step's pieces, in the order they are read, the one after that which is worked on ----

    static int num_pairs(int first, int end) { return (end - first + 1) / 2; }

    // Keys, two tiles a piece; then values, codes two tiles a piece, others 64 dimensions of all tiles.
    int num_pieces(int first, int end) const {
        const int pairs = num_pairs(first, end);
        return pairs + (is_bytes_ ? pairs : pairs == 0 ? 0 : int((head_dim_ + 63) / 64));
    }

    void fetch_after(const Step& step, int64_t block, int piece, int turns) {
        const int n = num_pieces(step.first_tile, step.end_tile);
        if (block != 0) ahead_.stop();
        else if (piece + 1 < n) fetch_piece(step.key, step.first_tile, step.end_tile, piece + 1, turns);
        else if (step.next_first < step.next_end) fetch_piece(step.next, step.next_first, step.next_end, 0, turns);
        else ahead_.stop();
    }

    void fetch_piece(const char* const* keys, int first, int end, int piece, int turns) {
        const int pairs = num_pairs(first, end);
        const bool are_values = piece >= pairs, are_pairs = is_bytes_ || !are_values;
        const int i = are_values ? piece - pairs : piece;
        const int t = are_pairs ? first + 2 * i : first, n = are_pairs ? int(lesser(2, end - t)) : end - first;
        const int64_t offset = (are_pairs ? 0 : i * kSliceBytes) + (are_values ? a_->layout.half_bytes() : 0);
        int64_t bytes = a_->layout.data_bytes() - (are_pairs ? 0 : i * kSliceBytes);
        if (!are_pairs) bytes = lesser(bytes, kSliceBytes);
        // Four places, or three: of fewer tiles the halves or quarters.
        const int parts = n == 1 ? 4 : n == 2 ? 2 : 1;
        bytes = (bytes / parts + 63) / 64 * 64;
        const char* places[kStepTiles];
        for (int p = 0; p < n * parts; ++p) places[p] = keys[t + p / parts] + offset + p % parts * bytes;
        ahead_.start(places, n * parts, bytes, turns);
    }

    // Those of the next step, as it begins with them.
    void fetch_scales(const Step& step) const {
        const int64_t data = a_->layout.data_bytes(), half = a_->layout.half_bytes();
        for (int t = step.next_first; t < step.next_end; ++t)
            for (int64_t at = data; at < data + kTile * 4; at += 64) {
                _mm_prefetch(step.next[t] + at, _MM_HINT_T0);
                _mm_prefetch(step.next[t] + half + at, _MM_HINT_T0);
            }
    }

    // ---- products ----

    // Up to 16 rows: tiles 0 to 3 hold sums, 4 queries, 5 to 7 keys; n tiles of keys.
    template <int n>
    void score_tiles(float* to, const bf16* q, const bf16* const* keys) {
        const int64_t group = 16 * head_dim_;
        _tile_zero(0);
        _tile_zero(1);
        if (n == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int k = 0; k < num_k_; ++k) {
            _tile_loadd(4, q + k * 512, 64);
            _tile_stored(4, warm_, 64);
            _tile_loadd(5, tiles_.key_rows(keys[0], k), 64);
            _tile_dpbf16ps(0, 4, 5);
            ahead_.turn();
            _tile_loadd(6, tiles_.key_rows(keys[0] + group, k), 64);
            _tile_dpbf16ps(1, 4, 6);
            ahead_.turn();
            if (n == 2) {
                _tile_loadd(7, tiles_.key_rows(keys[1], k), 64);
                _tile_dpbf16ps(2, 4, 7);
                ahead_.turn();
                _tile_loadd(5, tiles_.key_rows(keys[1] + group, k), 64);
                _tile_dpbf16ps(3, 4, 5);
                ahead_.turn();
            }
        }
        _tile_stored(0, to, kStep * 4);
        _tile_stored(1, to + 16, kStep * 4);
        if (n == 2) {
            _tile_stored(2, to + 32, kStep * 4);
            _tile_stored(3, to + 48, kStep * 4);
        }
    }

    // n groups of 16 dimensions from g on, of tiles [first, end) of the step.
    template <int n>
    MINIVLLM_INLINE void add_group(int64_t block, int first, int end, int g) {
        const int64_t stride = head_dim_ * 4;
        float* out = s_.seg_out + block * head_dim_ + g * 16;
        _tile_loadd(0, out, stride);
        if (n == 4) {
            _tile_loadd(1, out + 16, stride);
            _tile_loadd(2, out + 32, stride);
            _tile_loadd(3, out + 48, stride);
        }
        for (int t = first; t < end; ++t) {
            const bf16* values = values_of_[t] + g * 512;
            _tile_loadd(4, weights_ + t * 512, 64);
            _tile_stored(4, warm_, 64);
            _tile_loadd(5, values, 64);
            _tile_dpbf16ps(0, 4, 5);
            ahead_.turn();
            if (n == 4) {
                _tile_loadd(6, values + 512, 64);
                _tile_dpbf16ps(1, 4, 6);
                ahead_.turn();
                _tile_loadd(7, values + 1024, 64);
                _tile_dpbf16ps(2, 4, 7);
                ahead_.turn();
                _tile_loadd(5, values + 1536, 64);
                _tile_dpbf16ps(3, 4, 5);
                ahead_.turn();
            }
        }
        _tile_stored(0, out, stride);
        if (n == 4) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(2, out + 32, stride);
            _tile_stored(3, out + 48, stride);
        }
    }

    void add_cut_values(const Step& step, int64_t block, int64_t block_end) {
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            const int64_t p = step.begin + t * kTile;
            if (!is_cut(p)) continue;
            for (int64_t r = block; r < block_end; ++r)
                tiles_.add_infinite(s_.seg_out + r * head_dim_, weights_ + (r - block) * 32 + t * 512, step.key[t],
                                    rows_->begin[r] - p, rows_->end[r] - p);
        }
    }

    const Attention* a_ = nullptr;
    const Rows* rows_ = nullptr;
    State s_{};
    int64_t head_dim_ = 0;
    int num_k_ = 0;
    bool is_bytes_ = false, is_cut_ = false, has_values_ = false;
    Ahead<_MM_HINT_T0> ahead_;
    AmxTiles tiles_;
    bf16 *q_ = nullptr, *weights_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
    bf16* warm_ = nullptr;  // a tile that nobody reads: storing takes ten times as long a microsecond later
    const bf16 *keys_of_[kStepTiles] = {}, *values_of_[kStepTiles] = {};  // of the step's tiles
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
