// Writes new keys and values into their cache slots: head by head, so that a tile's lines stay near while it fills.
#include "kv_write.h"

#include "kv_store.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Below this many elements a thread, waking another costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

// Tokens from i on that are written together: 16 that fill half a tile, or those before the next that may.
int64_t num_together(const KvWrite& w, int64_t i, int64_t end) {
    int64_t n = 1;
    if (w.slots[i] >= 0 && w.slots[i] % 16 == 0) {
        while (n < 16 && i + n < end && w.slots[i + n] == w.slots[i] + n) ++n;
        return n;
    }
    while (n < kKvTile && i + n < end && w.slots[i + n] % 16 != 0) ++n;
    return n;
}

// Heads [first_head, end_head), the first of which k and v point to.
template <KvType type, class T>
void write_rows(const KvWrite& w, int64_t first_head, int64_t end_head, int64_t begin, int64_t end) {
    const KvLayout& layout = w.layout;
    const int64_t half = layout.half_bytes(), head_dim = layout.head_dim;
    const bool has_k = w.k != nullptr, has_v = w.v != nullptr;
    const auto tile_of = [&](int64_t slot, int64_t h) {
        return w.cache + layout.key_tile(slot / layout.block_size, h, slot % layout.block_size);
    };
    const auto key = [&](int64_t i, int64_t h) {
        return reinterpret_cast<const T*>(w.k + i * w.k_token_stride + (h - first_head) * w.k_head_stride);
    };
    const auto value = [&](int64_t i, int64_t h) {
        return reinterpret_cast<const T*>(w.v + i * w.v_token_stride + (h - first_head) * w.v_head_stride);
    };
    for (int64_t first = begin, n; first < end; first += n) {
        n = num_together(w, first, end);
        const int64_t slot = w.slots[first], t = slot % kKvTile;  // block_size is a multiple of the tile
        for (int64_t h = first_head; h < end_head; ++h) {
#if defined(__AVX512F__)
            if constexpr (kStoresBy16<type>)
                if (n == 16 && slot >= 0 && slot % 16 == 0) {
                    constexpr int64_t size = sizeof(T);
                    if (has_k)
                        store_16<type>(tile_of(slot, h), key(first, h), w.k_token_stride / size, t, head_dim, w.k_scale,
                                   [](auto... args) { place_16_keys(args...); });
                    if (has_v)
                        store_16<type>(tile_of(slot, h) + half, value(first, h), w.v_token_stride / size, t, head_dim,
                                   w.v_scale, [](auto... args) { place_16_values(args...); });
                    continue;
                }
#endif
            for (int64_t i = first; i < first + n; ++i) {
                if (w.slots[i] < 0) continue;
                char* tile = tile_of(w.slots[i], h);
                if (has_k) store_key<type>(tile, key(i, h), w.slots[i] % kKvTile, head_dim, w.k_scale);
                if (has_v) store_value<type>(tile + half, value(i, h), w.slots[i] % kKvTile, head_dim, w.v_scale);
            }
        }
    }
}

void heads(const KvWrite& w, int64_t first_head, int64_t end_head, int64_t begin, int64_t end) {
    with_dtype(w.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (w.layout.type) {
            case KvType::f32: return write_rows<KvType::f32, T>(w, first_head, end_head, begin, end);
            case KvType::bf16: return write_rows<KvType::bf16, T>(w, first_head, end_head, begin, end);
            case KvType::f16: return write_rows<KvType::f16, T>(w, first_head, end_head, begin, end);
            case KvType::fp8_e4m3: return write_rows<KvType::fp8_e4m3, T>(w, first_head, end_head, begin, end);
            case KvType::int8: return write_rows<KvType::int8, T>(w, first_head, end_head, begin, end);
        }
    });
}

void rows(const KvWrite& w, int64_t begin, int64_t end) { heads(w, 0, w.layout.num_kv_heads, begin, end); }

void head_rows(const KvWrite& w, int64_t head, int64_t begin, int64_t end) { heads(w, head, head + 1, begin, end); }

void run(const KvWrite& w) {
    parallel_for(w.num_tokens, kGrain / (w.layout.num_kv_heads * w.layout.head_dim) + 1,
                 [&](int64_t begin, int64_t end) { rows(w, begin, end); });
}

}  // namespace

const KvWriteKernels kv_write_kernels = {&run, &rows, &head_rows};

}  // namespace minivllm::MINIVLLM_ISA
