// Writes new keys and values into their cache slots: head by head, so that a tile's lines stay near while it fills.
#include "kv_write.h"

#include "kv_store.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Below this many elements a thread, waking another costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

template <KvType type, class T>
void write(const KvWrite& w) {
    const KvLayout& layout = w.layout;
    const int64_t heads = layout.num_kv_heads, half = layout.half_bytes();
    const int64_t grain = kGrain / (heads * layout.head_dim) + 1;
    parallel_for(w.num_tokens, grain, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += kKvTile)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t i = first; i < end && i < first + kKvTile; ++i) {
                    const int64_t slot = w.slots[i];
                    if (slot < 0) continue;
                    const int64_t token = slot % layout.block_size, t = token % kKvTile;
                    char* tile = w.cache + layout.key_tile(slot / layout.block_size, h, token);
                    const char* k = w.k + i * w.k_token_stride + h * w.k_head_stride;
                    const char* v = w.v + i * w.v_token_stride + h * w.v_head_stride;
                    store_key<type>(tile, reinterpret_cast<const T*>(k), t, layout.head_dim, w.k_scale);
                    store_value<type>(tile + half, reinterpret_cast<const T*>(v), t, layout.head_dim, w.v_scale);
                }
    });
}

void run(const KvWrite& w) {
    with_dtype(w.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (w.layout.type) {
            case KvType::f32: return write<KvType::f32, T>(w);
            case KvType::bf16: return write<KvType::bf16, T>(w);
            case KvType::f16: return write<KvType::f16, T>(w);
            case KvType::fp8_e4m3: return write<KvType::fp8_e4m3, T>(w);
            case KvType::int8: return write<KvType::int8, T>(w);
        }
    });
}

}  // namespace

const KvWriteKernels kv_write_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
