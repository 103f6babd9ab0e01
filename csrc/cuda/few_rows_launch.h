// Which kernels for few rows there are, and what a launch needs of each.
#pragma once

#include <type_traits>

#include "few_rows.h"

namespace minivllm::cuda {

// Calls visit(kernel, thread blocks, threads, shared memory in bytes) for the kernel that serves `p`; false if none does.
template <class Visit>
bool visit_few_rows_kernel(const FewRows& p, WeightType type, Visit&& visit) {
    if (p.num_rows < 1 || p.num_rows > kMostRows || p.row_bytes % 16 != 0) return false;
    const bool is_8_bit = type == WeightType::int8 || type == WeightType::fp8;
    if (is_8_bit != (p.x_scales != nullptr && p.weight_scales != nullptr)) return false;
    if (p.norm_weight != nullptr && (type != WeightType::bf16 || p.epilogue == Epilogue::add_residual)) return false;
    const auto with_norm = [&](auto weight_type, auto tiles, auto is_gated, auto has_norm, auto rows, auto depth) {
        constexpr WeightType kType = decltype(weight_type)::value;
        constexpr int kTiles = decltype(tiles)::value, kRows = decltype(rows)::value, kDepth = decltype(depth)::value;
        constexpr bool kIsGated = decltype(is_gated)::value;
        constexpr int kFewWarps = 8;
        visit(&few_rows_product<kType, kTiles, kIsGated, decltype(has_norm)::value, kRows, kFewWarps, kDepth, 1>,
              (p.out_features + 8 * kTiles - 1) / (8 * kTiles), 32 * kFewWarps,
              few_rows_shared_bytes<kTiles, kIsGated, kRows, kFewWarps>());
    };
    const auto with = [&](auto weight_type, auto tiles, auto is_gated, auto rows, auto depth) {
        constexpr WeightType kType = decltype(weight_type)::value;
        if constexpr (kType == WeightType::bf16)
            if (p.norm_weight != nullptr) return with_norm(weight_type, tiles, is_gated, std::true_type{}, rows, depth);
        with_norm(weight_type, tiles, is_gated, std::false_type{}, rows, depth);
    };
    const auto with_rows = [&](auto weight_type, auto rows) {
        using One = std::integral_constant<int, 1>;
        using Two = std::integral_constant<int, 2>;
        using Four = std::integral_constant<int, 4>;
        constexpr WeightType kType = decltype(weight_type)::value;
        constexpr bool kIs8Bit = kType == WeightType::int8 || kType == WeightType::fp8;
        if (p.epilogue == Epilogue::silu_mul)
            with(weight_type, One{}, std::true_type{}, rows, std::conditional_t<kIs8Bit, One, Two>{});
        else if constexpr (kIs8Bit)
            with(weight_type, Two{}, std::false_type{}, rows, One{});
        else if constexpr (decltype(rows)::value == 8)
            with(weight_type, One{}, std::false_type{}, rows, Four{});
        else
            with(weight_type, Two{}, std::false_type{}, rows, Two{});
    };
    const auto with_type = [&](auto weight_type) {
        if (p.num_rows <= 8) with_rows(weight_type, std::integral_constant<int, 8>{});
        else with_rows(weight_type, std::integral_constant<int, 16>{});
    };
    if (type == WeightType::bf16) with_type(std::integral_constant<WeightType, WeightType::bf16>{});
    else if (type == WeightType::f16) with_type(std::integral_constant<WeightType, WeightType::f16>{});
    else if (type == WeightType::int8) with_type(std::integral_constant<WeightType, WeightType::int8>{});
    else with_type(std::integral_constant<WeightType, WeightType::fp8>{});
    return true;
}

}  // namespace minivllm::cuda
