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
#include "kv_store.h"

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

    // Codes to bf16, exactly, in bf16's order; n is a multiple of 64.
    MINIVLLM_INLINE void widen_codes(bf16* to, const char* from, int64_t n) const {
        static constexpr CodeTable int8(KvType::int8), fp8(KvType::fp8_e4m3);
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        auto store = [&](int64_t i, __m512i low, __m512i high) {
            _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
            _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
        };
        if (a_->layout.type == KvType::int8) {
            // A table of 64 magnitudes takes half of the instructions: those above are 0x4280 + 2 (magnitude - 64).
            const __m512i low0 = _mm512_load_si512(int8.low), high0 = _mm512_load_si512(int8.high);
            for (int64_t i = 0; i < n; i += 64) {
                const __m512i code = _mm512_loadu_si512(from + i), twice = _mm512_add_epi8(code, code);
                const __mmask64 are_small = ~_mm512_movepi8_mask(twice);
                const __m512i low = _mm512_mask_permutexvar_epi8(twice, are_small, code, low0);
                const __m512i magnitude = _mm512_mask_permutexvar_epi8(_mm512_set1_epi8(0x42), are_small, code, high0);
                store(i, low, _mm512_ternarylogic_epi32(magnitude, code, sign, 0xf8));
            }
        } else {
            const __m512i low0 = _mm512_load_si512(fp8.low), low1 = _mm512_load_si512(fp8.low + 64);
            const __m512i high0 = _mm512_load_si512(fp8.high), high1 = _mm512_load_si512(fp8.high + 64);
            for (int64_t i = 0; i < n; i += 64) {
                const __m512i code = _mm512_loadu_si512(from + i);
                const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
                const __m512i magnitude = _mm512_permutex2var_epi8(high0, code, high1);
                store(i, low, _mm512_ternarylogic_epi32(magnitude, code, sign, 0xf8));
            }
        }
    }
    const bf16* widen(bf16* to, const char* from) const {
        widen_codes(to, from, kTile * head_dim_);
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

// A row's query as tiles' rows: [head_dim / 32] of them, `stride` elements apart, zeros beyond head_dim.
MINIVLLM_INLINE void read_query(bf16* to, int64_t stride, const Attention& a, int64_t token, int64_t head) {
    const bf16* from = static_cast<const bf16*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    for (int64_t d = 0; d < a.layout.head_dim; d += 32, to += stride) {
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

// Codes are fetched into L2, half a step before they are read, from several places in turn: the processor's own fetching
// follows each of them only some 20 lines ahead.
class Stream {
public:
    // `lines` from each place on, then those `stride` bytes behind, and so on, `times` in all.
    struct Places {
        const char* place[2 * kStepTiles];
        int num;
        int64_t lines, stride, times;
    };

    // What is read next, and then, evenly over so many turns.
    void start(const Places& next, const Places& then, int64_t turns) {
        then_ = then;
        take(next);
        rate_ = ((left_ + then.times * then.lines) * 256 + turns - 1) / turns;
        budget_ = 0;
    }
    void stop() { rate_ = budget_ = 0; }

    MINIVLLM_INLINE void turn() {
        for (budget_ += rate_; budget_ >= 256; budget_ -= 256) {
            if (left_ == 0) {
                if (then_.num == 0) return stop();
                take(then_);
                then_.num = 0;
            }
            for (int p = 0; p < now_.num; ++p) _mm_prefetch(now_.place[p] + at_ + line_ * 64, _MM_HINT_T1);
            --left_;
            if (++line_ == now_.lines) line_ = 0, at_ += now_.stride;
        }
    }

private:
    void take(const Places& places) {
        now_ = places;
        line_ = at_ = 0;
        left_ = places.times * places.lines;
    }

    Places now_{}, then_{};
    int64_t line_ = 0, at_ = 0, left_ = 0;  // of each of `now_`
    int64_t rate_ = 0, budget_ = 0;         // lines of each place a turn, and lines due, in 1/256
};

class AmxMath {
public:
    static constexpr int64_t kBlock = 16;
    // Whether a walk of one position's rows can write its keys and values.
    static bool may_write(const Attention& a) {
        return a.layout.type == KvType::bf16 && a.num_heads / a.layout.num_kv_heads <= kBlock;
    }
    // Rows of several heads take a step together: their softmax is one stretch, in which the processor works on several
    // rows at once, and keys and values are read as they lie. With 16 rows what they need leaves the first cache; codes
    // wait for memory, not for that.
    static int64_t most_heads(const Attention& a) {
        const int64_t group = a.num_heads / a.layout.num_kv_heads;
        return a.layout.type == KvType::bf16 ? 8 / group : lesser(4, kBlock / group);
    }

    static size_t bytes(const Attention& a, int64_t num_rows) {
        const int64_t d = a.layout.head_dim;
        return size_t(num_rows * (d + 16) + kBlock * kStep + kStep * d + kRing * 512 + 512) * 2 +
               AmxTiles::bytes(a);
    }

    AmxMath() = default;
    AmxMath(const Attention& a, const Rows& rows, const State& state, char* memory)
        : a_(&a), rows_(&rows), s_(state), head_dim_(a.layout.head_dim), num_k_(int((head_dim_ + 31) / 32)),
          num_heads_(int(rows.count / rows.per_head)), tile_(32 * (num_heads_ == 1 ? kBlock : rows.per_head)) {
        q_ = reinterpret_cast<bf16*>(memory);
        weights_ = q_ + (rows.count + kBlock - 1) / kBlock * kBlock * num_k_ * 32;
        values_ = weights_ + kBlock * kStep;
        ring_ = values_ + kStep * head_dim_;
        warm_ = ring_ + kRing * 512;
        tiles_ = AmxTiles(a, reinterpret_cast<char*>(warm_ + 512));
        is_bytes_ = tiles_.are_bytes();
    }

    // Queries as tiles, [rows / 16][head_dim / 32][16][32]; of several heads, a tile for each head's rows.
    void start() {
        const int64_t rows = tile_ / 32;
        for (int64_t r = 0; r < rows_->count; ++r)
            read_query(q_ + r / rows * num_k_ * tile_ + r % rows * 32, tile_, *a_, rows_->token[r], rows_->head[r]);
        shape_tiles(int(lesser(rows_->per_head, kBlock)));
    }

    void finish() const { _tile_release(); }

    void begin_step(const Step& step) {
        is_cut_ = has_values_ = false;
        if (is_bytes_) fetch_codes(step);
    }

    void scores(const Step& step, int64_t block, int64_t) {
        const bf16* q = q_ + block * num_k_ * 32;
        if (is_bytes_) return score_codes(step, q);
        for (int h = 0; h < num_heads_; ++h) {
            const int64_t offset = h * a_->layout.head_bytes();
            const bf16* head_q = q + h * num_k_ * tile_;
            float* scores = s_.scores + h * tile_ / 32 * kStep;
            score_head(step, offset, head_q, scores, after_keys(step, h));
            if (const int64_t p = position_to_write(step); p >= 0) {  // its lines are near now
                const char* tile = step.key[p / kTile] + offset;
                place_key(to_write(tile), new_row(rows_->write->k, rows_->write->k_token_stride,
                                                  rows_->write->k_head_stride, h), p % kTile, head_dim_);
                const bf16* keys = reinterpret_cast<const bf16*>(tile) + p % kTile / 16 * 16 * head_dim_;
                score_keys(keys, head_q, scores + p / 16 * 16, keys);
            }
        }
    }

    static MINIVLLM_INLINE Vec weight(Vec x) { return amx_weight(x); }
    MINIVLLM_INLINE void look_ahead() {
        if (is_bytes_) codes_ahead_.turn();
    }

    // Weights as tiles, [KV head][step's tile][rows][32].
    void set_weights(int64_t r, const Vec (&x)[kStepVecs]) {
        for (int t = 0; t < kStepTiles; ++t) round_weights(weights_of(r), tile_, t, x[2 * t], x[2 * t + 1]);
    }
    void no_weights(int64_t r) {
        for (int t = 0; t < kStepTiles; ++t) _mm512_store_si512(weights_of(r) + t * tile_, _mm512_setzero_si512());
    }

    void add_values(const Step& step, int64_t block, int64_t block_end) {
        if (is_bytes_ && !(rows_differ() && is_any_cut(step))) return add_codes(step, block);
        for (int h = 0; h < num_heads_; ++h) {
            if (is_bytes_ || num_heads_ > 1 || !has_values_) read_values(step, h);
            has_values_ = true;
            add_head(step, s_.seg_out + (block + h * tile_ / 32) * head_dim_, weights_ + h * kStepTiles * tile_,
                     after_values(step, h));
        }
        if (is_cut_) add_cut_values(step, block, block_end);
    }

private:
    static constexpr int kRowTurns = 4;  // of a row's softmax
    static constexpr int kPieces = 4, kRing = 2 * kPieces;  // of 1 KiB: widened so many before they are multiplied

    bool is_cut(int64_t p) const {
        return rows_->begin[rows_->count - 1] > p || rows_->end[0] < p + kTile;
    }

    bool is_any_cut(const Step& step) const {
        return is_cut(step.begin + step.first_tile * kTile) || is_cut(step.begin + (step.end_tile - 1) * kTile);
    }
    bool rows_differ() const {
        const int64_t last = rows_->count - 1;
        return rows_->end[0] != rows_->end[last] || rows_->begin[0] != rows_->begin[last];
    }

    bf16* weights_of(int64_t r) const {
        const int64_t rows = tile_ / 32;
        return weights_ + r / rows * kStepTiles * tile_ + r % rows * 32;
    }

    // ---- what is still to be written ----

    // From the step's first; -1: nothing is, or not here.
    int64_t position_to_write(const Step& step) const {
        const int64_t p = rows_->end[0] - 1 - step.begin;
        return rows_->write != nullptr && p < kStep ? p : -1;
    }
    char* to_write(const char* tile) const { return rows_->write->cache + (tile - a_->kv_cache); }
    const bf16* new_row(const char* rows, int64_t token_stride, int64_t head_stride, int h) const {
        const int64_t head = rows_->head[0] / (a_->num_heads / a_->layout.num_kv_heads) + h;
        return reinterpret_cast<const bf16*>(rows + rows_->token[0] * token_stride + head * head_stride);
    }

    // Where the values of the step's tiles lie as bf16, of the h-th head.
    void read_values(const Step& step, int h) {
        const int64_t half = a_->layout.half_bytes(), last = rows_->count - 1, offset = h * a_->layout.head_bytes();
        const int64_t written = position_to_write(step);
        const auto write = [&](char* tile) {
            place_value(tile, new_row(rows_->write->v, rows_->write->v_token_stride, rows_->write->v_head_stride, h),
                        written % kTile, head_dim_);
        };
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            const char* tile = step.key[t] + offset + half;
            bf16* own = values_ + t * kTile * head_dim_;
            values_of_[t] = is_bytes_ ? tiles_.widen(own, tile) : reinterpret_cast<const bf16*>(tile);
            const int64_t p = step.begin + t * kTile;
            const bool is_new = written >= 0 && written / kTile == t;
            if (is_cut(p)) {
                is_cut_ |= tiles_.keep_visible(own, values_of_[t], rows_->begin[0] - p, rows_->end[last] - p,
                                               rows_differ());
                values_of_[t] = own;
                if (is_new) write(reinterpret_cast<char*>(own));
            }
            if (is_new) write(to_write(tile));
        }
    }

    // ---- fetching ahead ----

    // What is read after a head's keys, and after its values.
    const bf16* after_keys(const Step& step, int head) const {
        const bool is_last = head + 1 == num_heads_;
        return reinterpret_cast<const bf16*>(
            step.key[step.first_tile] + (is_last ? a_->layout.half_bytes() : (head + 1) * a_->layout.head_bytes()));
    }
    const bf16* after_values(const Step& step, int head) const {
        const int64_t offset = a_->layout.half_bytes() + (head + 1) * a_->layout.head_bytes();
        const char* after = step.key[step.first_tile];  // at the end of all, anything
        if (head + 1 < num_heads_) after += offset;
        else if (step.next_first < step.next_end) after = step.next[step.next_first];
        return reinterpret_cast<const bf16*>(after);
    }

    // The values, then the keys of the next step; and at once the next values' scales, with which it begins.
    void fetch_codes(const Step& step) {
        const int64_t half = a_->layout.half_bytes();
        codes_ahead_.start(codes_of(step.key, step.first_tile, step.end_tile, half),
                           codes_of(step.next, step.next_first, step.next_end, 0),
                           num_pieces(step, 2 * num_k_ + head_dim_ / 16) + lesser(rows_->count, kBlock) * kRowTurns);
        if (!has_scales(*a_)) return;
        for (int t = step.next_first; t < step.next_end; ++t)
            for (int h = 0; h < num_heads_; ++h) {
                const char* scales = step.next[t] + h * a_->layout.head_bytes() + half + a_->layout.data_bytes();
                _mm_prefetch(scales, _MM_HINT_T1);
                _mm_prefetch(scales + 64, _MM_HINT_T1);
            }
    }

    // The tiles' keys, or what lies `offset` bytes behind them, of all heads, two at a time.
    Stream::Places codes_of(const char* const* keys, int first, int end, int64_t offset) const {
        const int64_t lines = (a_->layout.tile_bytes() + 63) / 64, stride = a_->layout.head_bytes();
        const int together = num_heads_ % 2 == 0 ? 2 : 1;
        Stream::Places places{{}, 0, lines, together * stride, first < end ? num_heads_ / together : 0};
        for (int h = 0; h < together; ++h)
            for (int t = first; t < end; ++t) places.place[places.num++] = keys[t] + offset + h * stride;
        return places;
    }

    // ---- products ----

    // Up to 16 rows: tiles 0 to 3 hold sums, 4 queries or weights, 5 to 7 keys or values.

    void score_head(const Step& step, int64_t offset, const bf16* q, float* scores, const bf16* after) {
        const auto tile = [&](int t) { return reinterpret_cast<const bf16*>(step.key[t] + offset); };
        for (int t = step.first_tile; t < step.end_tile; ++t) {
            for (int i = 0; i < 2; ++i) {
                const bf16* keys = tile(t) + i * 16 * head_dim_;
                const bf16* next = i == 0 ? keys + 16 * head_dim_ : t + 1 < step.end_tile ? tile(t + 1) : after;
                score_keys(keys, q, scores + t * kTile + i * 16, next);
            }
        }
    }

    // Of 16 positions.
    MINIVLLM_INLINE void score_keys(const bf16* keys, const bf16* q, float* scores, const bf16* next) {
        _tile_zero(0);
        for (int k = 0; k < num_k_; ++k) {
            touch_kib(k + 1 < num_k_ ? keys + (k + 1) * 512 : next);
            _tile_loadd(4, q + k * tile_, 64);
            _tile_loadd(5, tiles_.key_rows(keys, k), 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(4, warm_, 64);
        _tile_stored(0, scores, kStep * 4);
    }

    void add_head(const Step& step, float* out, const bf16* weights, const bf16* after) {
        const int groups = int(head_dim_ / 16), first = step.first_tile, end = step.end_tile;
        for (int g = 0; g < groups;) {
            const int n = g + 4 <= groups ? 4 : 1;
            const bf16* next = g + n < groups ? values_of_[first] + (g + n) * 512 : after;
            if (n == 4) add_group<4>(out + g * 16, weights, first, end, g, next);
            else add_group<1>(out + g * 16, weights, first, end, g, next);
            g += n;
        }
    }

    // n groups of 16 dimensions from g on, of tiles [first, end) of the step.
    template <int n>
    MINIVLLM_INLINE void add_group(float* out, const bf16* weights, int first, int end, int g, const bf16* after) {
        const int64_t stride = head_dim_ * 4;
        _tile_loadd(0, out, stride);
        if (n == 4) {
            _tile_loadd(1, out + 16, stride);
            _tile_loadd(2, out + 32, stride);
            _tile_loadd(3, out + 48, stride);
        }
        for (int t = first; t < end; ++t) {
            const bf16* values = values_of_[t] + g * 512;
            const bf16* next = t + 1 < end ? values_of_[t + 1] + g * 512 : after;
            _tile_loadd(4, weights + t * tile_, 64);
            _tile_stored(4, warm_, 64);
            touch_kib(n == 4 ? values + 512 : next);
            _tile_loadd(5, values, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (n == 4) {
                touch_kib(values + 1024);
                _tile_loadd(6, values + 512, 64);
                _tile_dpbf16ps(1, 4, 6);
                touch_kib(values + 1536);
                _tile_loadd(7, values + 1024, 64);
                _tile_dpbf16ps(2, 4, 7);
                touch_kib(next);
                _tile_loadd(5, values + 1536, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, out, stride);
        if (n == 4) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(2, out + 32, stride);
            _tile_stored(3, out + 48, stride);
        }
    }

    // ---- products of codes, which are widened a KiB at a time, a few pieces before they are multiplied ----

    // Of a step, all heads'.
    int64_t num_pieces(const Step& step, int64_t of_tile) const {
        return num_heads_ * (step.end_tile - step.first_tile) * of_tile;
    }

    bf16* ring(int piece) const { return ring_ + piece % kRing * 512; }

    void score_codes(const Step& step, const bf16* q) {
        const int num = int(num_pieces(step, 2 * num_k_));
        int widened = 0, head = 0, tile = step.first_tile, group = 0, k = 0;
        const char* from = step.key[tile];
        auto widen_next = [&] {
            const char* codes = from + (group * head_dim_ + k * 32) * 16;
            bf16* to = ring(widened++);
            if (k * 32 + 32 <= head_dim_) tiles_.widen_codes(to, codes, 512);
            else tiles_.widen_codes(to, codes, 256), std::memset(to + 256, 0, 512);
            codes_ahead_.turn();
            if (++k < num_k_) return;
            k = 0;
            if (++group < 2) return;
            group = 0;
            if (++tile == step.end_tile) tile = step.first_tile, ++head;
            from = step.key[tile] + head * a_->layout.head_bytes();
        };
        while (widened < kPieces && widened < num) widen_next();
        int piece = 0;
        for (int h = 0; h < num_heads_; ++h)
            for (int t = step.first_tile; t < step.end_tile; ++t) {
                float* to = s_.scores + h * tile_ / 32 * kStep + t * kTile;
                for (int g = 0; g < 2; ++g) {
                    _tile_zero(0);
                    for (int i = 0; i < num_k_; ++i) {
                        if (widened < num) widen_next();
                        _tile_loadd(4, q + (h * num_k_ + i) * tile_, 64);
                        if (i % 2 == 0) _tile_stored(4, warm_, 64);
                        _tile_loadd(5, ring(piece++), 64);
                        _tile_dpbf16ps(0, 4, 5);
                    }
                    _tile_stored(0, to + g * 16, kStep * 4);
                }
            }
    }

    void add_codes(const Step& step, int64_t block) {
        const int groups = int(head_dim_ / 16), first = step.first_tile, end = step.end_tile;
        const int num = int(num_pieces(step, groups));
        const int64_t half = a_->layout.half_bytes(), stride = head_dim_ * 4;
        int widened = 0, quad = 0, tile = first, group = 0, head = 0;
        auto widen_next = [&] {
            bf16* to = ring(widened++);
            tiles_.widen_codes(to, step.key[tile] + half + head * a_->layout.head_bytes() + group * 512, 512);
            const int64_t p = step.begin + tile * kTile;
            if (is_cut(p)) keep_positions(to, rows_->begin[0] - p, rows_->end[0] - p);
            codes_ahead_.turn();
            if (++group < quad + 4 && group < groups) return;
            group = quad;
            if (++tile < end) return;
            tile = first, group = quad += 4;
            if (quad < groups) return;
            group = quad = 0, ++head;
        };
        while (widened < kPieces && widened < num) widen_next();
        int piece = 0;
        for (int h = 0; h < num_heads_; ++h)
            for (int g = 0; g < groups; g += 4) {
                const int n = int(lesser(4, groups - g));
                float* out = s_.seg_out + (block + h * tile_ / 32) * head_dim_ + g * 16;
                _tile_loadd(0, out, stride);
                if (n > 1) _tile_loadd(1, out + 16, stride);
                if (n > 2) _tile_loadd(2, out + 32, stride);
                if (n > 3) _tile_loadd(3, out + 48, stride);
                for (int t = first; t < end; ++t) {
                    _tile_loadd(4, weights_ + (h * kStepTiles + t) * tile_, 64);
                    _tile_stored(4, warm_, 64);
                    if (widened < num) widen_next();
                    _tile_loadd(5, ring(piece++), 64);
                    _tile_dpbf16ps(0, 4, 5);
                    if (n > 1) {
                        if (widened < num) widen_next();
                        _tile_loadd(6, ring(piece++), 64);
                        _tile_dpbf16ps(1, 4, 6);
                    }
                    if (n > 2) {
                        if (widened < num) widen_next();
                        _tile_loadd(7, ring(piece++), 64);
                        _tile_dpbf16ps(2, 4, 7);
                    }
                    if (n > 3) {
                        if (widened < num) widen_next();
                        _tile_loadd(5, ring(piece++), 64);
                        _tile_dpbf16ps(3, 4, 5);
                    }
                }
                _tile_stored(0, out, stride);
                if (n > 1) _tile_stored(1, out + 16, stride);
                if (n > 2) _tile_stored(2, out + 32, stride);
                if (n > 3) _tile_stored(3, out + 48, stride);
            }
    }

    // Of 16 dimensions of a value tile, only positions [begin, end) remain.
    void keep_positions(bf16* values, int64_t begin, int64_t end) const {
        for (int pair = 0; pair < 16; ++pair) {
            const uint32_t even = 2 * pair >= begin && 2 * pair < end ? 0x55555555u : 0;
            const uint32_t odd = 2 * pair + 1 >= begin && 2 * pair + 1 < end ? 0xaaaaaaaau : 0;
            if ((even | odd) == ~0u) continue;
            bf16* at = values + pair * 32;
            _mm512_storeu_si512(at, _mm512_maskz_mov_epi16(even | odd, _mm512_loadu_si512(at)));
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
    int num_heads_ = 0;  // KV heads
    int64_t tile_ = 0;   // elements of a tile of queries or of weights
    bool is_bytes_ = false, is_cut_ = false, has_values_ = false;
    Stream codes_ahead_;
    AmxTiles tiles_;
    bf16 *q_ = nullptr, *weights_ = nullptr, *values_ = nullptr, *ring_ = nullptr;
    bf16* warm_ = nullptr;  // a tile that nobody reads: storing takes ten times as long a microsecond later
    const bf16* values_of_[kStepTiles] = {};  // of the step's tiles
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
