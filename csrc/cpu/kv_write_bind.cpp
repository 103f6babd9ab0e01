// Writes new keys and values into their cache slots. It only moves bytes, so one compilation serves every processor.
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include <nanobind/stl/array.h>

#include "../bindings.h"
#include "thread_pool.h"

namespace minivllm {

// Below this many bytes a thread, waking another costs more than it saves.
static constexpr int64_t kBytesPerThread = 1 << 16;

struct KvWrite {
    char* cache;  // [num_blocks, 2, num_kv_heads, block_size, head_bytes]
    const char *k, *v;
    const int64_t* slots;
    int64_t num_kv_heads, head_bytes, block_size;
    std::array<int64_t, 2> k_strides, v_strides;  // token, head; in bytes

    void write(int64_t token) const {
        const int64_t slot = slots[token];
        if (slot < 0) return;
        const int64_t head_stride = block_size * head_bytes, half_block = num_kv_heads * head_stride;
        char* to = cache + slot / block_size * 2 * half_block + slot % block_size * head_bytes;
        for (int64_t h = 0; h < num_kv_heads; ++h, to += head_stride) {
            std::memcpy(to, k + token * k_strides[0] + h * k_strides[1], size_t(head_bytes));
            std::memcpy(to + half_block, v + token * v_strides[0] + h * v_strides[1], size_t(head_bytes));
        }
    }
};

static void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
    for (int64_t t = 0; t < num_tokens; ++t)
        if (slots[t] < -1 || slots[t] >= num_slots)
            throw std::out_of_range("slot_mapping[" + std::to_string(t) + "] = " + std::to_string(slots[t]) +
                                    " lies outside the cache of " + std::to_string(num_slots) + " slots");
}

static void kv_write(uintptr_t cache, uintptr_t k, uintptr_t v, uintptr_t slot_mapping, int64_t item_bytes,
                     std::array<int64_t, 3> shape, std::array<int64_t, 2> k_strides, std::array<int64_t, 2> v_strides,
                     std::array<int64_t, 2> blocks) {
    const auto [num_tokens, num_kv_heads, head_dim] = shape;
    const auto [num_blocks, block_size] = blocks;
    for (int64_t* stride : {&k_strides[0], &k_strides[1], &v_strides[0], &v_strides[1]}) *stride *= item_bytes;
    check_slots(ptr<const int64_t>(slot_mapping), num_tokens, num_blocks * block_size);
    const KvWrite job{ptr<char>(cache),      ptr<const char>(k), ptr<const char>(v), ptr<const int64_t>(slot_mapping),
                      num_kv_heads,          head_dim * item_bytes, block_size,      k_strides, v_strides};
    const int64_t token_bytes = 2 * num_kv_heads * job.head_bytes;
    parallel_for(num_tokens, kBytesPerThread / token_bytes + 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) job.write(t);
    });
}

MINIVLLM_BIND(kv_write, m) { m.def("kv_write", &kv_write, release_gil); }

}  // namespace minivllm
