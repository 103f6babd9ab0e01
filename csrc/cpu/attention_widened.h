// Keys and values that are bytes in the cache, as bf16: each thread's own of the KV head that it is at, so that all of
// a prompt's walks over a head widen a tile once. Included by attention.cpp only.
#pragma once

#include "attention_amx.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// A tile has its place by its number in the sequence, which it shares, in long ones, with others kTiles away. Used
// within one call of the kernel, as the cache may change between two. Memory: this thread's scratch 3.
class WidenedTiles {
public:
    WidenedTiles() = default;
    WidenedTiles(const WidenedTiles&) = delete;

    // What is asked for from now on is of this request and KV head.
    void begin(const Attention& a, int32_t request, int32_t kv_head) {
        if (a.layout.type == KvType::bf16 || (request == request_ && kv_head == kv_head_)) return;
        a_ = &a, request_ = request, kv_head_ = kv_head;
        elements_ = kTile * a.layout.head_dim;
        const int64_t in_sequence = (a.seq_lens[request] + kStep - 1) / kStep * kStepTiles;
        const int64_t num = lesser(in_sequence, kTiles);
        char* p = static_cast<char*>(thread_scratch(3, size_t(num * (elements_ * 4 + kTile * 8 + 8))));
        keys_ = reinterpret_cast<bf16*>(p);
        values_ = keys_ + num * elements_;
        factors_ = reinterpret_cast<float*>(values_ + num * elements_);
        v_scales_ = factors_ + num * kTile;
        key_at_ = reinterpret_cast<int32_t*>(v_scales_ + num * kTile);
        value_at_ = key_at_ + num;
        for (int64_t i = 0; i < num; ++i) key_at_[i] = value_at_[i] = -1;
    }

    MINIVLLM_INLINE const bf16* keys(const AmxTiles& tiles, int64_t tile, const char* key_tile) {
        const int64_t i = tile % kTiles;
        if (key_at_[i] != tile) widen_keys(tiles, tile, key_tile);
        return keys_ + i * elements_;
    }
    MINIVLLM_INLINE const bf16* values(const AmxTiles& tiles, int64_t tile, const char* key_tile) {
        const int64_t i = tile % kTiles;
        if (value_at_[i] != tile) widen_values(tiles, tile, key_tile);
        return values_ + i * elements_;
    }

    // Of a tile and those after it in its step, whose keys were asked for. See load_scales.
    const float* factors(int64_t tile) const { return factors_ + tile % kTiles * kTile; }
    const float* v_scales(int64_t tile) const { return v_scales_ + tile % kTiles * kTile; }

    // Where the tile's keys and values lie, or null: they are yet to be widened.
    const char* found_keys(int64_t tile) const {
        const int64_t i = tile % kTiles;
        return key_at_[i] == tile ? reinterpret_cast<const char*>(keys_ + i * elements_) : nullptr;
    }
    const char* found_values(int64_t tile) const {
        const int64_t i = tile % kTiles;
        return value_at_[i] == tile ? reinterpret_cast<const char*>(values_ + i * elements_) : nullptr;
    }

private:
    static constexpr int64_t kTiles = 512;  // 8 MiB of 128 dimensions

    __attribute__((noinline)) void widen_keys(const AmxTiles& tiles, int64_t tile, const char* key_tile) {
        const int64_t i = tile % kTiles;
        tiles.widen(keys_ + i * elements_, key_tile);
        if (has_scales(*a_)) load_scales(*a_, key_tile, factors_ + i * kTile, v_scales_ + i * kTile);
        key_at_[i] = int32_t(tile);
    }
    __attribute__((noinline)) void widen_values(const AmxTiles& tiles, int64_t tile, const char* key_tile) {
        const int64_t i = tile % kTiles;
        tiles.widen(values_ + i * elements_, key_tile + a_->layout.half_bytes());
        value_at_[i] = int32_t(tile);
    }

    const Attention* a_ = nullptr;
    int32_t request_ = -1, kv_head_ = -1;
    int64_t elements_ = 0;                            // of a tile
    bf16 *keys_ = nullptr, *values_ = nullptr;        // [tiles][elements]
    float *factors_ = nullptr, *v_scales_ = nullptr;  // [tiles][kTile]
    int32_t *key_at_ = nullptr, *value_at_ = nullptr;  // [tiles]: which lies there
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
