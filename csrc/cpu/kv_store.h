// Writing one token's key and value into their tiles, for kernels that have them at hand as float32 or in q's type.
// The rules of isa.h hold here too.
#pragma once

#include "isa.h"
#include "kv_layout.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {

// The scale of a token's int8 codes, its largest magnitude being 127; NaN if it has an element that is not finite.
template <class T>
MINIVLLM_INLINE float int8_scale(const T* row, int64_t n) {
    Vec largest = zero(), nothing = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec x = load(row + i);
        largest = max(max(x, zero() - x), largest);
        nothing = nothing + x * zero();  // NaN if x is not finite
    }
    return reduce_add(nothing) == 0 ? reduce_max(largest) / 127.0f : __builtin_nanf("");
}

// To the nearest whole number: a magnitude of up to 127 with the sign above it.
MINIVLLM_INLINE UVec int8_codes(Vec x) {
    const Vec n = round_even(x);
    return to_integers(where_less(n, zero(), set1(128) - n, n));
}

// To the nearest e4m3, ties to even; what is larger than 448 becomes 448, NaN stays.
MINIVLLM_INLINE UVec fp8_codes(Vec x) {
    const UVec sign = shift_right<24>(bits_of(x)) & uset1(0x80);
    const Vec magnitude = min(set1(448), floats_of(bits_of(x) & uset1(0x7fffffff)));
    const UVec bits = bits_of(magnitude), odd = shift_right<20>(bits) & uset1(1);
    const UVec normal = shift_right<20>(bits + uset1(0x7ffff) + odd) - uset1(120 << 3);
    // Subnormals count in 2^-9, the last bit of a float32 near 2^14.
    const UVec subnormal = bits_of(magnitude + set1(0x1p14f)) - bits_of(set1(0x1p14f));
    const Vec code = where_less(magnitude, set1(0x1p-6f), floats_of(subnormal), floats_of(normal));
    return bits_of(where_less(magnitude, set1(449), code, floats_of(uset1(0x7f)))) | sign;
}

// An element as a cache of `type` stores it.
template <KvType type>
using Stored = std::conditional_t<type == KvType::f32, float,
                                  std::conditional_t<type == KvType::bf16, bf16,
                                                     std::conditional_t<type == KvType::f16, f16, uint8_t>>>;

// The row of token t as it is stored in `tile`, its elements still in their order: in `room`, or where they are if that
// changes nothing. Writes an int8 row's scale. scale: what fp8 codes are in units of.
template <KvType type, class T>
MINIVLLM_INLINE const Stored<type>* stored_row(
    char* tile, Stored<type>* room, const T* row, int64_t t, int64_t head_dim, float scale) {
    if constexpr (std::is_same_v<Stored<type>, T>) return row;
    if constexpr (type == KvType::int8) {
        scale = int8_scale(row, head_dim);
        std::memcpy(tile + kKvTile * head_dim + t * 4, &scale, 4);
    }
    const bool is_zero = type == KvType::int8 && !(scale > 0);  // or not a number
    for (int64_t i = 0; i < head_dim; i += kLanes) {
        if constexpr (std::is_same_v<Stored<type>, uint8_t>) {
            const Vec x = load(row + i) / set1(scale);
            store_bytes(room + i, is_zero ? uset1(0) : type == KvType::int8 ? int8_codes(x) : fp8_codes(x));
        } else {
            store(room + i, load(row + i));
        }
    }
    return room;
}

// A stored row to its places in a tile, see kv_layout.h. Made once for each way to store, not once more for each type of
// rows: converting while placing took gcc half a minute.
template <class E>
[[gnu::noinline]] void place_key(char* tile, const E* row, int64_t t, int64_t head_dim) {
    if constexpr (std::is_same_v<E, bf16>) {
        uint32_t* to = reinterpret_cast<uint32_t*>(tile) + t / 16 * 8 * head_dim + t % 16;
        for (int64_t p = 0; p < head_dim / 2; ++p) std::memcpy(to + p * 16, row + 2 * p, 4);
    } else if constexpr (std::is_same_v<E, uint8_t>) {
        char* to = tile + t / 16 * 16 * head_dim + t % 16 / 4 * 16 + t % 4 * 2;
        for (int64_t p = 0; p < head_dim / 2; ++p) std::memcpy(to + p / 2 * 64 + p % 2 * 8, row + 2 * p, 2);
    } else {
        E* to = reinterpret_cast<E*>(tile) + t;
        for (int64_t d = 0; d < head_dim; ++d) to[d * kKvTile] = row[d];
    }
}

template <class E>
[[gnu::noinline]] void place_value(char* tile, const E* row, int64_t t, int64_t head_dim) {
    if constexpr (std::is_same_v<E, bf16>) {
        bf16* to = reinterpret_cast<bf16*>(tile) + t / 2 * 32;
        for (int64_t g = 0; g < head_dim / 16; ++g) {
#if defined(__AVX512BW__)
            const auto x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + g * 16)));
            if (t % 2 == 0) _mm512_mask_storeu_epi16(to + g * 512, 0x55555555, x);
            else _mm512_mask_storeu_epi16(to + g * 512, 0xaaaaaaaa, _mm512_slli_epi32(x, 16));
#else
            for (int64_t d = 0; d < 16; ++d) to[g * 512 + d * 2 + t % 2] = row[g * 16 + d];
#endif
        }
    } else if constexpr (std::is_same_v<E, uint8_t>) {
        char* to = tile + t / 4 * 64 + t / 2 % 2 * 8 + t % 2;
        for (int64_t g = 0; g < head_dim / 16; ++g)
            for (int64_t d = 0; d < 16; ++d) to[g * 512 + d / 4 * 16 + d % 4 * 2] = char(row[g * 16 + d]);
    } else {
        std::memcpy(reinterpret_cast<E*>(tile) + t * head_dim, row, size_t(head_dim) * sizeof(E));
    }
}

// One head's key of token t into `tile`, its value into `tile + half_bytes`. scale: of fp8, ignored by other types.
// Same rows of the same layout give the same bytes, whoever calls.
template <KvType type, class T>
MINIVLLM_INLINE void store_key(char* tile, const T* row, int64_t t, int64_t head_dim, float scale) {
    alignas(64) Stored<type> room[kMostHeadDim];
    place_key(tile, stored_row<type>(tile, room, row, t, head_dim, scale), t, head_dim);
}

template <KvType type, class T>
MINIVLLM_INLINE void store_value(char* tile, const T* row, int64_t t, int64_t head_dim, float scale) {
    alignas(64) Stored<type> room[kMostHeadDim];
    place_value(tile, stored_row<type>(tile, room, row, t, head_dim, scale), t, head_dim);
}

#if defined(__AVX512F__)
// The same for stored rows of 16 tokens at once, of which t, a multiple of 16, is the first; rows lie `stride` elements
// apart. Each line of a tile is written once, as a whole.
inline void place_16_keys(char* tile, const bf16* rows, int64_t stride, int64_t t, int64_t head_dim) {
    bf16* to = reinterpret_cast<bf16*>(tile) + t / 16 * 16 * head_dim;
    for (int64_t d = 0; d < head_dim; d += 32) {
        const int pairs = head_dim - d < 32 ? int(head_dim - d) / 2 : 16;
        Vec block[16];  // a pair of dimensions travels as one 32-bit lane
        for (int i = 0; i < 16; ++i) {
            const float* row = reinterpret_cast<const float*>(rows + i * stride + d);
            block[i] = pairs == 16 ? load(row) : load_partial(row, pairs);
        }
        transpose(block);
        for (int i = 0; i < pairs; ++i) store(reinterpret_cast<float*>(to + (d / 2 + i) * 32), block[i]);
    }
}

inline void place_16_values(char* tile, const bf16* rows, int64_t stride, int64_t t, int64_t head_dim) {
    const auto widened = [](const bf16* row) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    };
    bf16* to = reinterpret_cast<bf16*>(tile) + t / 2 * 32;
    for (int64_t d = 0; d < head_dim; d += 16)
        for (int i = 0; i < 16; i += 2) {
            const __m512i odd = _mm512_slli_epi32(widened(rows + (i + 1) * stride + d), 16);
            _mm512_storeu_si512(to + d / 16 * 512 + i / 2 * 32, _mm512_or_si512(widened(rows + i * stride + d), odd));
        }
}

inline void place_16_keys(char* tile, const uint8_t* rows, int64_t stride, int64_t t, int64_t head_dim) {
    char* to = tile + t / 16 * 16 * head_dim;
    // Of each quarter of a line, [token][pair][2] becomes [pair][token][2].
    const __m512i by_pair = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int64_t d = 0; d < head_dim; d += 64) {
        const int fours = head_dim - d < 64 ? int(head_dim - d) / 4 : 16;
        Vec block[16];  // four dimensions travel as one 32-bit lane
        for (int i = 0; i < 16; ++i) {
            const float* row = reinterpret_cast<const float*>(rows + i * stride + d);
            block[i] = fours == 16 ? load(row) : load_partial(row, fours);
        }
        transpose(block);
        for (int i = 0; i < fours; ++i)
            _mm512_storeu_si512(to + (d / 4 + i) * 64,
                                _mm512_shuffle_epi8(_mm512_castps_si512(block[i].v), by_pair));
    }
}

inline void place_16_values(char* tile, const uint8_t* rows, int64_t stride, int64_t t, int64_t head_dim) {
    const auto row = [&](int64_t i, int64_t d) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride + d));
    };
    for (int64_t d = 0; d < head_dim; d += 16)
        for (int64_t i = 0; i < 16; i += 4) {
            const __m128i a = row(i, d), b = row(i + 1, d), c = row(i + 2, d), e = row(i + 3, d);
            const __m128i low01 = _mm_unpacklo_epi8(a, b), high01 = _mm_unpackhi_epi8(a, b);
            const __m128i low23 = _mm_unpacklo_epi8(c, e), high23 = _mm_unpackhi_epi8(c, e);
            __m128i* to = reinterpret_cast<__m128i*>(tile + d / 16 * 512 + (t + i) / 4 * 64);
            _mm_storeu_si128(to, _mm_unpacklo_epi64(low01, low23));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi64(low01, low23));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi64(high01, high23));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi64(high01, high23));
        }
}

// Whether tokens are stored 16 at a time where they can be.
template <KvType type>
constexpr bool kStoresBy16 = std::is_same_v<Stored<type>, bf16> || std::is_same_v<Stored<type>, uint8_t>;

// Stores rows of 16 tokens as store_key or store_value store each: place is place_16_keys or place_16_values.
template <KvType type, class T, class Place>
void store_16(char* tile, const T* rows, int64_t stride, int64_t t, int64_t head_dim, float scale, const Place& place) {
    if constexpr (std::is_same_v<Stored<type>, T>) {
        place(tile, rows, stride, t, head_dim);
    } else {
        alignas(64) Stored<type> room[16 * kMostHeadDim];
        for (int64_t i = 0; i < 16; ++i)
            stored_row<type>(tile, room + i * head_dim, rows + i * stride, t + i, head_dim, scale);
        place(tile, room, head_dim, t, head_dim);
    }
}
#else
template <KvType>
constexpr bool kStoresBy16 = false;
#endif

}  // namespace minivllm::MINIVLLM_ISA
