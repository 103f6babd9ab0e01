// Decode attention over the paged cache: one query row a request, split along its keys (split-KV as in FlashDecoding,
// Dao et al. 2023) at fixed borders, every 1,024 absolute positions; a second kernel merges the segments, ascending.
//
// A thread block takes segments of one request and one KV head, for all query heads that share it (at most 16: the
// rows of a tensor core's tile, most of them empty: reading the cache is the limit, multiplying is not). There are
// num_parts of them a request and KV head, and part i takes segments i, i + num_parts, …, each from nothing: which block
// a segment falls to changes no bit. One that finds no segment ends before it touches shared memory. Its four warps take every fourth tile of 16 keys each, and carry a running (maximum, sum of weights, sum of values) over
// them, ascending; the four are added up in the order of the warps. So a row's bits depend on its own query, keys and
// values only. Each warp keeps a ring of tiles under way to shared memory and waits for nobody else in its loop.
//
// Which element of a tile a thread multiplies is chosen so that no data need to change lanes. With g = lane / 4 and
// t = lane % 4, the order of the head's dimensions in the first product is that in which a thread finds eight of them
// side by side (32 k + 8 t …), and column g of the second product's tile e is dimension (8 m + g) * n + e, with n
// elements in 16 bytes. 16-byte chunks of a row are stored at places exchanged by `key_swizzle` and `value_swizzle`,
// so that lanes that read together meet different banks.
//
// The cache is the Triton backend's: [num_blocks, (K, V), num_kv_heads, block_size rows of head_dim elements and,
// for int8, block_size float32 scales] (minivllm/ops/kv_layout.py, RowLayout).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode_attention_sizes.h"
#include "device.h"
#include "fp8.h"

namespace minivllm::cuda {

constexpr int kSegment = 1024;  // absolute positions; DESIGN's, the CPU's and Triton's
constexpr int kTile = 16;       // keys
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRingBytes = 24 << 10;  // of a warp, about: two thread blocks fit into an H100's multiprocessor
constexpr int kMostLooped = 128;  // head size
// Bytes that a thread block takes at most: what every card has from compute capability 8.0 on, and, of head size 256 in
// 16 bits, what 8.6, 8.9 and 12.0 do not have (minivllm/ops/cuda.py asks the card).
constexpr int kMostShared = 99 << 10, kMostSharedOfLarge = 128 << 10;
constexpr float kLog2e = 1.4426950408889634f;

// 2^(from - to), and 0 where nothing has been seen yet.
MINIVLLM_DEVICE float weight_of(float from, float to) { return from == -INFINITY ? 0.0f : exp_2(from - to); }

// Within 1.5e-7, not relatively.
MINIVLLM_DEVICE float tanh_of(float x) { return 1.0f - 2.0f / (exp_2(2.0f * kLog2e * x) + 1.0f); }

MINIVLLM_DEVICE uint32_t word_of(uint4 words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Positions [first, seq_len) are seen.
MINIVLLM_DEVICE int first_seen(int seq_len, int window) {
    return window > 0 && seq_len > window ? seq_len - window : 0;
}

MINIVLLM_DEVICE bool is_split(int first, int seq_len) { return first / kSegment != (seq_len - 1) / kSegment; }

MINIVLLM_DEVICE void store(const DecodeAttention& p, int req, int head, int d, float sum, float top, float total) {
    if (p.sinks != nullptr) {
        const float sink = p.sinks[head] * kLog2e, last = fmaxf(top, sink), shrink = weight_of(top, last);
        sum *= shrink;
        total = total * shrink + exp_2(sink - last);
    }
    const float result = sum / (total == 0.0f ? 1.0f : total) * p.value_scale;
    const uint32_t bits = p.is_bf16 ? pack<true>(result, 0.0f) : pack<false>(result, 0.0f);
    static_cast<uint16_t*>(p.out)[req * p.out_token_stride + int64_t(head) * p.head_dim + d] = uint16_t(bits);
}

// Two codes in the low half of `codes` as float16.
template <KvType kKv>
MINIVLLM_DEVICE uint32_t halves_of(uint32_t codes) {
    if constexpr (kKv == KvType::fp8_e4m3) return halves_of_fp8(codes);
    // As an unsigned number c + 128 it is the low byte of the float16 1024 + (c + 128).
    return subtract_halves(pick_bytes(codes ^ 0x8080u, 0x64646464u, 0x4140), 0x64806480u);
}

// One kernel's sizes. 8-bit caches are multiplied in float16, which holds each of their numbers.
template <bool kIsBf16, KvType kKv, int kHeadDim, int kRows>
struct Tiling {
    static constexpr bool kIs8Bit = kKv != KvType::same;
    static_assert(!(kIs8Bit && kIsBf16));
    static_assert(kRows == 8 || kRows == 16);
    static constexpr int kElementBytes = kIs8Bit ? 1 : 2;
    static constexpr int kInChunk = 16 / kElementBytes;  // elements
    static constexpr int kRowBytes = kHeadDim * kElementBytes;
    static constexpr int kChunks = kRowBytes / 16;
    static_assert(kChunks % 8 == 0, "a row is whole lines of 128 bytes, which the swizzles exchange chunks within");
    static constexpr int kHalfBytes = kTile * kRowBytes;
    static constexpr int kScaleBytes = kKv == KvType::int8 ? 4 * kTile : 0;
    static constexpr int kStageBytes = 2 * (kHalfBytes + kScaleBytes);
    static constexpr int kStages = kRingBytes / kStageBytes < 2 ? 2 : kRingBytes / kStageBytes;
    static constexpr int kMergeBytes = kWarps * kRows * (kHeadDim + 2) * 4;
    static constexpr int kSharedBytes =
        kWarps * kStages * kStageBytes > kMergeBytes ? kWarps * kStages * kStageBytes : kMergeBytes;
    static_assert(kSharedBytes <= (kHeadDim == 256 && !kIs8Bit ? kMostSharedOfLarge : kMostShared));

    MINIVLLM_DEVICE static int key_swizzle(int key) { return kIs8Bit ? (key & 3) << 1 : (key & 1) << 2; }
    MINIVLLM_DEVICE static int value_swizzle(int key) { return (key >> 1 & 3) << 1; }
};

// The queries of rows g and g + 8, as the first factor of each 16 dimensions; rows of no head are 0.
template <class T, bool kIsBf16, int kHeadDim>
MINIVLLM_DEVICE void load_queries(uint32_t (&queries)[kHeadDim / 16][4], const DecodeAttention& p, int req,
                                  int kv_head, int group, int g, int t) {
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        const int64_t place = req * p.q_token_stride + int64_t(kv_head * group + row) * p.q_head_stride + 8 * t;
#pragma unroll
        for (int k = 0; k < kHeadDim / 32; ++k) {
            uint4 words = {0, 0, 0, 0};
            if (row < group)
                words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q) + place + 32 * k);
            uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
            if (T::kIs8Bit && p.is_bf16)
                for (uint32_t& pair : pairs) {
                    // Beyond float16 only where a model has gone wrong, but never infinite.
                    const float low = fminf(fmaxf(unpack<true>(pair), -65504.0f), 65504.0f);
                    const float high = fminf(fmaxf(unpack<true>(pair >> 16), -65504.0f), 65504.0f);
                    const bool is_nan = unpack<true>(pair) != unpack<true>(pair) ||
                                        unpack<true>(pair >> 16) != unpack<true>(pair >> 16);
                    pair = is_nan ? 0x7fff7fffu : pack<false>(low, high);
                }
            queries[2 * k][half] = pairs[0], queries[2 * k][2 + half] = pairs[1];
            queries[2 * k + 1][half] = pairs[2], queries[2 * k + 1][2 + half] = pairs[3];
        }
    }
}

// One segment of a request, if it sees positions of it; to `out` if it sees no other, else to its place in the parts.
// `shared` is nobody's when all threads have come here, and may be in use when one returns.
template <bool kIsBf16, KvType kKv, int kHeadDim, int kRows>
MINIVLLM_DEVICE void attend_segment(const DecodeAttention& p, char* const shared, int req, int kv_head, int segment) {
    using T = Tiling<kIsBf16, kKv, kHeadDim, kRows>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = p.num_heads / p.num_kv_heads, border = segment * kSegment;
    const int seq_len = p.seq_lens[req], first = first_seen(seq_len, p.window);
    const int begin = first > border ? first : border;
    const int end = seq_len < border + kSegment ? seq_len : border + kSegment;
    if (begin >= end) return;

    // This warp's tiles are those of numbers kWarps * i + warp, i from i_begin to before i_end.
    const int first_tile = (begin - border) / kTile, end_tile = (end - border + kTile - 1) / kTile;
    const int i_begin = first_tile > warp ? (first_tile - warp + kWarps - 1) / kWarps : 0;
    const int i_end = end_tile > warp ? (end_tile - warp + kWarps - 1) / kWarps : 0;
    int block_of_tile = 0;  // lane i holds that of tile i: a segment has 64
    if (lane >= i_begin && lane < i_end)
        block_of_tile = p.block_table[req * p.table_stride + (border + (kWarps * lane + warp) * kTile) / p.block_size];

    char* const ring = shared + warp * T::kStages * T::kStageBytes;
    const auto fetch = [&](int i) {
        const int64_t block = shuffle(block_of_tile, i % 32);
        if (i < i_end) {
            const int position = border + (kWarps * i + warp) * kTile, in_block = position % p.block_size;
            const char* const head = p.cache + block * p.block_bytes + kv_head * p.head_bytes;
            char* const stage = ring + i % T::kStages * T::kStageBytes;
#pragma unroll
            for (int c = lane; c < kTile * T::kChunks; c += 32) {
                const int key = c / T::kChunks, chunk = c % T::kChunks;
                const bool is_seen = position + key >= begin && position + key < end;
                const char* const from = head + int64_t(in_block + key) * T::kRowBytes + chunk * 16;
                char* const row = stage + key * T::kRowBytes;
                copy_async_16(row + (chunk ^ T::key_swizzle(key)) * 16, from, is_seen);
                copy_async_16(row + T::kHalfBytes + (chunk ^ T::value_swizzle(key)) * 16, from + p.half_bytes, is_seen);
            }
            if (kKv == KvType::int8 && lane < 8) {
                const char* const scales = head + int64_t(p.block_size) * kHeadDim + in_block * 4;
                copy_async_16(stage + 2 * T::kHalfBytes + lane * 16,
                              scales + lane / 4 * p.half_bytes + lane % 4 * 16, true);
            }
        }
        commit_copies();
    };

    for (int i = i_begin; i < i_begin + T::kStages - 1; ++i) fetch(i);
    uint32_t queries[kHeadDim / 16][4];
    load_queries<T, kIsBf16, kHeadDim>(queries, p, req, kv_head, group, g, t);

    // By half: of row g, and of row g + 8. (With 8 rows the second half is dead, and no registers are kept for it.)
    float sums[kHeadDim / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;

    for (int i = i_begin; i < i_end; ++i) {
        wait_copies<T::kStages - 2>();
        warp_barrier();  // everybody's copies of this tile are there, and everybody is done with the tile before
        fetch(i + T::kStages - 1);
        const int position = border + (kWarps * i + warp) * kTile;
        const char* const keys = ring + i % T::kStages * T::kStageBytes;
        const char* const values = keys + T::kHalfBytes;
        const float* const scales = reinterpret_cast<const float*>(keys + 2 * T::kHalfBytes);

        float scores[2][4] = {};  // of keys 8 j + 2 t and the next: first row g's, then row g + 8's
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int key = 8 * j + g;
            const char* const row = keys + key * T::kRowBytes;
#pragma unroll
            for (int k = 0; k < kHeadDim / 32; ++k) {
                uint32_t pairs[4];
                if constexpr (T::kIs8Bit) {
                    const char* const place = row + ((2 * k + t / 2) ^ T::key_swizzle(key)) * 16 + t % 2 * 8;
                    const uint2 codes = *reinterpret_cast<const uint2*>(place);
                    pairs[0] = halves_of<kKv>(codes.x & 0xffffu), pairs[1] = halves_of<kKv>(codes.x >> 16);
                    pairs[2] = halves_of<kKv>(codes.y & 0xffffu), pairs[3] = halves_of<kKv>(codes.y >> 16);
                } else {
                    const char* const place = row + ((4 * k + t) ^ T::key_swizzle(key)) * 16;
                    const uint4 words = *reinterpret_cast<const uint4*>(place);
                    pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
                }
                multiply_add<kIsBf16>(scores[j], queries[2 * k], {pairs[0], pairs[1]});
                multiply_add<kIsBf16>(scores[j], queries[2 * k + 1], {pairs[2], pairs[3]});
            }
        }

        float value_scales[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int key = 8 * j + 2 * t + e;
                const bool is_seen = position + key >= begin && position + key < end;
                float key_scale = p.scale;
                if (kKv == KvType::int8) {
                    key_scale *= scales[key];
                    value_scales[j][e] = is_seen ? scales[kTile + key] : 0.0f;  // what lies behind may be anything
                }
#pragma unroll
                for (int half = 0; half < kRows / 8; ++half) {
                    float& score = scores[j][2 * half + e];
                    score *= key_scale;
                    if (p.softcap > 0.0f) score = p.softcap * tanh_of(score / p.softcap);
                    score = is_seen ? score * kLog2e : -INFINITY;
                }
            }

        uint32_t weights[4] = {0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < kRows / 8; ++half) {
            float(&low)[4] = scores[0];
            float(&high)[4] = scores[1];
            float most = fmaxf(fmaxf(low[2 * half], low[2 * half + 1]), fmaxf(high[2 * half], high[2 * half + 1]));
            most = fmaxf(most, shuffle_xor(most, 1));
            most = fmaxf(most, shuffle_xor(most, 2));
            most = fmaxf(most, top[half]);
            const float from = most == -INFINITY ? 0.0f : most, shrink = exp_2(top[half] - from);
            top[half] = most;
            float w[2][2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                w[0][e] = exp_2(low[2 * half + e] - from);
                w[1][e] = exp_2(high[2 * half + e] - from);
            }
            total[half] = total[half] * shrink + ((w[0][0] + w[0][1]) + (w[1][0] + w[1][1]));
            weights[half] = pack<kIsBf16>(w[0][0] * value_scales[0][0], w[0][1] * value_scales[0][1]);
            weights[2 + half] = pack<kIsBf16>(w[1][0] * value_scales[1][0], w[1][1] * value_scales[1][1]);
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) sums[n][2 * half] *= shrink, sums[n][2 * half + 1] *= shrink;
        }

#pragma unroll
        for (int m = 0; m < T::kChunks / 8; ++m) {
            uint4 rows[4];  // of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int key = 2 * t + k % 2 + k / 2 * 8;
                const char* const row = values + key * T::kRowBytes;
                rows[k] = *reinterpret_cast<const uint4*>(row + ((8 * m + g) ^ T::value_swizzle(key)) * 16);
            }
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const auto word = [&](int k) { return word_of(rows[k], w); };
                float(*const to)[4] = sums + m * T::kInChunk + w * (T::kInChunk / 4);
                const auto add = [&](int e, uint32_t first_pair, uint32_t second_pair) {
                    if (kRows == 8) to[e][2] = to[e][3] = 0.0f;
                    multiply_add<kIsBf16>(to[e], weights, {first_pair, second_pair});
                };
                if constexpr (T::kIs8Bit) {
#pragma unroll
                    for (int e = 0; e < 4; e += 2) {
                        const uint32_t bytes = e == 0 ? 0x5140 : 0x7362;
                        const uint32_t low = pick_bytes(word(0), word(1), bytes);
                        const uint32_t high = pick_bytes(word(2), word(3), bytes);
                        add(e, halves_of<kKv>(low & 0xffffu), halves_of<kKv>(high & 0xffffu));
                        add(e + 1, halves_of<kKv>(low >> 16), halves_of<kKv>(high >> 16));
                    }
                } else {
                    add(0, pick_bytes(word(0), word(1), 0x5410), pick_bytes(word(2), word(3), 0x5410));
                    add(1, pick_bytes(word(0), word(1), 0x7632), pick_bytes(word(2), word(3), 0x7632));
                }
            }
        }
    }

    // The four warps' rows, added up in their order. The rings' memory is free now.
    wait_copies<0>();
    barrier();
    float* const part_sums = reinterpret_cast<float*>(shared);           // [kWarps, kRows, kHeadDim]
    float* const part_tops = part_sums + kWarps * kRows * kHeadDim;      // [kWarps, kRows, 2]
#pragma unroll
    for (int half = 0; half < kRows / 8; ++half) {
        const int row = warp * kRows + g + 8 * half;
        total[half] += shuffle_xor(total[half], 1);
        total[half] += shuffle_xor(total[half], 2);
        if (t == 0) part_tops[2 * row] = top[half], part_tops[2 * row + 1] = total[half];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const int m = n / T::kInChunk, e = n % T::kInChunk;
#pragma unroll
            for (int c = 0; c < 2; ++c)
                part_sums[row * kHeadDim + (8 * m + 2 * t + c) * T::kInChunk + e] = sums[n][2 * half + c];
        }
    }
    barrier();
    for (int at = threadIdx.x; at < group * kHeadDim; at += kThreads) {
        const int row = at / kHeadDim, d = at % kHeadDim, head = kv_head * group + row;
        float most = -INFINITY, sum = 0.0f, all = 0.0f;
        for (int w = 0; w < kWarps; ++w) most = fmaxf(most, part_tops[2 * (w * kRows + row)]);
        for (int w = 0; w < kWarps; ++w) {
            const int part = w * kRows + row;
            const float share = weight_of(part_tops[2 * part], most);
            // A warp that saw nothing counts as nothing, whatever it holds.
            sum += share == 0.0f ? 0.0f : part_sums[part * kHeadDim + d] * share;
            all += part_tops[2 * part + 1] * share;
        }
        if (is_split(first, seq_len)) {
            const int64_t part = (int64_t(req) * p.max_segments + segment) * p.num_heads + head;
            p.part_sums[part * kHeadDim + d] = sum;
            if (d == 0) p.part_tops[2 * part] = most, p.part_tops[2 * part + 1] = all;
        } else {
            store(p, req, head, d, sum, most, all);
        }
    }
}

// Grid: (num_kv_heads, num_reqs, num_parts) of kThreads. Parts change last: the first of each request, which have most to
// do and always something, are started before those that may be empty. A head size of 256 has no register left to loop
// with: its num_parts is max_segments.
template <bool kIsBf16, KvType kKv, int kHeadDim, int kRows>
MINIVLLM_KERNEL(kThreads, 1) decode_part(const DecodeAttention p) {
    MINIVLLM_SHARED(shared);
    let_next_kernel_begin();
    const int kv_head = blockIdx.x, req = blockIdx.y, part = blockIdx.z;
    if constexpr (kHeadDim > kMostLooped) {
        attend_segment<kIsBf16, kKv, kHeadDim, kRows>(p, shared, req, kv_head, part);
    } else {
        int segment = first_seen(p.seq_lens[req], p.window) / kSegment + part;
        while (segment * kSegment < p.seq_lens[req]) {
            attend_segment<kIsBf16, kKv, kHeadDim, kRows>(p, shared, req, kv_head, segment);
            segment += p.num_parts;
            barrier();  // the next one's copies fall where sums may still be read
        }
    }
}

constexpr int kMergedAtOnce = 8;

// Grid: (num_heads, num_reqs) of head_dim threads.
MINIVLLM_KERNEL(256, 1) merge_segments(const DecodeAttention p) {
    let_next_kernel_begin();
    const int head = blockIdx.x, req = blockIdx.y, d = threadIdx.x;
    const int seq_len = p.seq_lens[req], first = first_seen(seq_len, p.window);
    if (seq_len == 0 || !is_split(first, seq_len)) return;
    const int first_segment = first / kSegment, end_segment = (seq_len - 1) / kSegment + 1;
    float top = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int start = first_segment; start < end_segment; start += kMergedAtOnce) {
        float part_tops[kMergedAtOnce], part_totals[kMergedAtOnce], part_sums[kMergedAtOnce];
#pragma unroll
        for (int i = 0; i < kMergedAtOnce; ++i) {  // all loads under way before the first sum
            const int segment = start + i < end_segment ? start + i : end_segment - 1;
            const int64_t part = (int64_t(req) * p.max_segments + segment) * p.num_heads + head;
            part_tops[i] = p.part_tops[2 * part], part_totals[i] = p.part_tops[2 * part + 1];
            part_sums[i] = p.part_sums[part * p.head_dim + d];
        }
#pragma unroll
        for (int i = 0; i < kMergedAtOnce; ++i) {
            if (start + i >= end_segment) break;
            const float most = fmaxf(top, part_tops[i]);
            const float old = weight_of(top, most), its = weight_of(part_tops[i], most);
            sum = sum * old + part_sums[i] * its;
            total = total * old + part_totals[i] * its;
            top = most;
        }
    }
    store(p, req, head, d, sum, top, total);
}

}  // namespace minivllm::cuda
