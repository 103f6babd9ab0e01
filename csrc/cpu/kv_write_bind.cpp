// Checks slots before anything is written, and registers the kernel.
#include <array>
#include <stdexcept>
#include <string>

#include <nanobind/stl/array.h>

#include "../bindings.h"
#include "kv_write.h"

namespace minivllm {

void check(const KvWrite& w, int64_t num_blocks) {
    const KvLayout& layout = w.layout;
    if (layout.head_dim % kHeadDimStep != 0 || layout.head_dim > kMostHeadDim || layout.block_size % kKvTile != 0)
        throw std::invalid_argument("head_dim " + std::to_string(layout.head_dim) + " is no multiple of 16 up to " +
                                    std::to_string(kMostHeadDim) + ", or block size " +
                                    std::to_string(layout.block_size) + " none of 32");
    const int64_t num_slots = num_blocks * layout.block_size;
    for (int64_t t = 0; t < w.num_tokens; ++t)
        if (w.slots[t] < -1 || w.slots[t] >= num_slots)
            throw std::out_of_range("slot_mapping[" + std::to_string(t) + "] = " + std::to_string(w.slots[t]) +
                                    " lies outside the cache of " + std::to_string(num_slots) + " slots");
}

static void kv_write(uintptr_t cache, uintptr_t k, uintptr_t v, uintptr_t slot_mapping, int dtype, int kv_type,
                     std::array<int64_t, 3> shape, std::array<int64_t, 2> k_strides, std::array<int64_t, 2> v_strides,
                     std::array<int64_t, 2> blocks, float k_scale, float v_scale) {
    const auto [num_tokens, num_kv_heads, head_dim] = shape;
    const auto [num_blocks, block_size] = blocks;
    const int64_t size = size_of(DType(dtype));
    const KvWrite write{ptr<char>(cache), KvLayout{KvType(kv_type), num_kv_heads, head_dim, block_size},
                        ptr<const char>(k), ptr<const char>(v), ptr<const int64_t>(slot_mapping), DType(dtype),
                        num_tokens, k_strides[0] * size, k_strides[1] * size, v_strides[0] * size, v_strides[1] * size,
                        k_scale, v_scale};
    check(write, num_blocks);
    kv_write_kernels().run(write);
}

MINIVLLM_BIND(kv_write, m) { def_op(m, "kv_write", &kv_write); }

}  // namespace minivllm
