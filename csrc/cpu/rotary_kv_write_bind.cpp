// Checks positions and slots before anything is written, and registers the kernel.
#include "rotary_kv_write.h"

#include <array>

#include <nanobind/stl/array.h>

#include "../bindings.h"

namespace minivllm {

static void rotary_kv_write(int dtype, uintptr_t q, int64_t q_heads, std::array<int64_t, 2> q_strides, uintptr_t q_norm,
                            uintptr_t k, std::array<int64_t, 2> k_strides, uintptr_t k_norm, float eps,
                            uintptr_t positions, uintptr_t cos_sin, int64_t max_position, int64_t rot_dim, uintptr_t v,
                            std::array<int64_t, 2> v_strides, uintptr_t cache, int kv_type,
                            std::array<int64_t, 3> shape, std::array<int64_t, 2> blocks, uintptr_t slot_mapping,
                            float k_scale, float v_scale) {
    const auto [num_tokens, num_kv_heads, head_dim] = shape;
    const auto [num_blocks, block_size] = blocks;
    const int64_t size = size_of(DType(dtype));
    const KvWrite write{ptr<char>(cache), KvLayout{KvType(kv_type), num_kv_heads, head_dim, block_size}, nullptr,
                        ptr<const char>(v), ptr<const int64_t>(slot_mapping), DType(dtype), num_tokens, 0, 0,
                        v_strides[0] * size, v_strides[1] * size, k_scale, v_scale};
    check_positions(ptr<const int64_t>(positions), num_tokens, max_position);
    check(write, num_blocks);
    rotary_kv_write_kernels().run({ptr<void>(q), q_heads, q_strides[0], q_strides[1], ptr<const void>(q_norm)},
                                  {ptr<void>(k), num_kv_heads, k_strides[0], k_strides[1], ptr<const void>(k_norm)},
                                  write, eps, ptr<const int64_t>(positions), ptr<const float>(cos_sin), rot_dim);
}

MINIVLLM_BIND(rotary_kv_write, m) { def_op(m, "rotary_kv_write", &rotary_kv_write); }

}  // namespace minivllm
