// Checks slots before anything is written, and registers the kernel.
#include <array>
#include <stdexcept>
#include <string>

#include <nanobind/stl/array.h>

#include "../bindings.h"
#include "kv_write.h"

namespace minivllm {

static void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
    for (int64_t t = 0; t < num_tokens; ++t)
        if (slots[t] < -1 || slots[t] >= num_slots)
            throw std::out_of_range("slot_mapping[" + std::to_string(t) + "] = " + std::to_string(slots[t]) +
                                    " lies outside the cache of " + std::to_string(num_slots) + " slots");
}

static void kv_write(uintptr_t cache, uintptr_t k, uintptr_t v, uintptr_t slot_mapping, int dtype, int kv_type,
                     std::array<int64_t, 3> shape, std::array<int64_t, 2> k_strides, std::array<int64_t, 2> v_strides,
                     std::array<int64_t, 2> blocks, float k_scale, float v_scale) {
    const auto [num_tokens, num_kv_heads, head_dim] = shape;
    const auto [num_blocks, block_size] = blocks;
    if (head_dim % kHeadDimStep != 0 || head_dim > kMostHeadDim || block_size % kKvTile != 0)
        throw std::invalid_argument("head_dim " + std::to_string(head_dim) + " is no multiple of 16 up to " +
                                    std::to_string(kMostHeadDim) + ", or block size " + std::to_string(block_size) +
                                    " none of 32");
    check_slots(ptr<const int64_t>(slot_mapping), num_tokens, num_blocks * block_size);
    const int64_t size = size_of(DType(dtype));
    kv_write_kernels().run({ptr<char>(cache), KvLayout{KvType(kv_type), num_kv_heads, head_dim, block_size},
                            ptr<const char>(k), ptr<const char>(v), ptr<const int64_t>(slot_mapping), DType(dtype),
                            num_tokens, k_strides[0] * size, k_strides[1] * size, v_strides[0] * size,
                            v_strides[1] * size, k_scale, v_scale});
}

MINIVLLM_BIND(kv_write, m) { def_op(m, "kv_write", &kv_write); }

}  // namespace minivllm
