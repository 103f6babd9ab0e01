// Which kernels for few rows there are, and what a launch needs of each.
#pragma once

#include <type_traits>

#include "few_rows.h"

namespace minivllm::cuda {

constexpr int kNarrow = 4096;  // features, below which a thread block makes 8 of them instead of 16

// How a kernel cuts its work: by what an H100 does fastest with the weights of 1B and 8B shapes (benchmarks/LOG.md). The
// number of warps, which the order of sums follows, is the same for any number of rows.
template <WeightType kType, bool kIsGated, bool kIsNarrow, int kRows>
struct FewRowsCut {
    static constexpr bool kIs8Bit = kType == WeightType::int8 || kType == WeightType::fp8;
    static constexpr bool kIsGatedFp8 = kIsGated && kType == WeightType::fp8;
    static constexpr int kTiles = kIsGated || (kIsNarrow && !kIs8Bit && kRows == 8) ? 1 : 2;
    static constexpr int kWarps = kIsGatedFp8 ? 4 : 8;
    static constexpr int kDepth = kType == WeightType::fp8 ? (kIsGated ? 2 : 1) : kIs8Bit && kIsGated ? 1 : 2;
    static constexpr int kBlocks = kIs8Bit ? 1 : kIsNarrow && !kIsGated && kRows == 8 ? 3 : 2;
};

// Calls visit(kernel, thread blocks, threads, shared memory in bytes) for the kernel that serves `p`; false if none does.
template <class Visit>
bool visit_few_rows_kernel(const FewRows& p, WeightType type, Visit&& visit) {
    if (p.num_rows < 1 || p.num_rows > kMostRows || p.row_bytes % 16 != 0) return false;
    const bool is_8_bit = type == WeightType::int8 || type == WeightType::fp8;
    if (is_8_bit != (p.x_scales != nullptr && p.weight_scales != nullptr)) return false;
    const auto take = [&](auto weight_type, auto is_gated, auto is_narrow, auto rows) {
        constexpr WeightType kType = decltype(weight_type)::value;
        constexpr bool kIsGated = decltype(is_gated)::value;
        constexpr int kRows = decltype(rows)::value;
        using Cut = FewRowsCut<kType, kIsGated, decltype(is_narrow)::value, kRows>;
        visit(&few_rows_product<kType, Cut::kTiles, kIsGated, kRows, Cut::kWarps, Cut::kDepth, Cut::kBlocks>,
              (p.out_features + 8 * Cut::kTiles - 1) / (8 * Cut::kTiles), 32 * Cut::kWarps,
              few_rows_shared_bytes<Cut::kTiles, kIsGated, kRows, Cut::kWarps>());
    };
    const auto with_rows = [&](auto weight_type, auto rows) {
        if (p.epilogue == Epilogue::silu_mul) take(weight_type, std::true_type{}, std::false_type{}, rows);
        else if (p.out_features < kNarrow) take(weight_type, std::false_type{}, std::true_type{}, rows);
        else take(weight_type, std::false_type{}, std::false_type{}, rows);
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
