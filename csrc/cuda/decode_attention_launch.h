// Which decode kernels there are, and what a launch needs of each.
#pragma once

#include <type_traits>

#include "decode_attention.h"

namespace minivllm::cuda {

// Calls visit(kernel, shared memory in bytes) for the kernel that serves `p`; false if none does.
template <class Visit>
bool visit_decode_kernel(const DecodeAttention& p, KvType kv, Visit&& visit) {
    const int group = p.num_heads / p.num_kv_heads;
    if (p.num_parts < (p.head_dim > kMostLooped ? p.max_segments : 1)) return false;
    const auto take = [&](auto is_bf16, auto kv_type, auto head_dim, auto rows) {
        constexpr bool kIsBf16 = decltype(is_bf16)::value;
        constexpr KvType kKv = decltype(kv_type)::value;
        constexpr int kHeadDim = decltype(head_dim)::value, kRows = decltype(rows)::value;
        visit(&decode_part<kIsBf16, kKv, kHeadDim, kRows>, Tiling<kIsBf16, kKv, kHeadDim, kRows>::kSharedBytes);
        return true;
    };
    const auto with_rows = [&](auto is_bf16, auto kv_type, auto head_dim) {
        using Rows8 = std::integral_constant<int, 8>;
        using Rows16 = std::integral_constant<int, 16>;
        if (group <= 8) return take(is_bf16, kv_type, head_dim, Rows8{});
        if constexpr (decltype(head_dim)::value <= 128)
            if (group <= 16) return take(is_bf16, kv_type, head_dim, Rows16{});
        return false;
    };
    const auto with_head_dim = [&](auto is_bf16, auto kv_type) {
        if constexpr (decltype(kv_type)::value == KvType::same)
            if (p.head_dim == 64) return with_rows(is_bf16, kv_type, std::integral_constant<int, 64>{});
        if (p.head_dim == 128) return with_rows(is_bf16, kv_type, std::integral_constant<int, 128>{});
        if (p.head_dim == 256) return with_rows(is_bf16, kv_type, std::integral_constant<int, 256>{});
        return false;
    };
    using Same = std::integral_constant<KvType, KvType::same>;
    using Fp8 = std::integral_constant<KvType, KvType::fp8_e4m3>;
    using Int8 = std::integral_constant<KvType, KvType::int8>;
    if (kv == KvType::fp8_e4m3) return with_head_dim(std::false_type{}, Fp8{});
    if (kv == KvType::int8) return with_head_dim(std::false_type{}, Int8{});
    return p.is_bf16 ? with_head_dim(std::true_type{}, Same{}) : with_head_dim(std::false_type{}, Same{});
}

}  // namespace minivllm::cuda
