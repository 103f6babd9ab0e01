// Linear layers in int8.
//
// A packed weight: a float32 scale for each place of a feature, then the panels of `Int8Layout`.
#include "linear_int8.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// ---- packing ----

int64_t packed_bytes(DType, int64_t n, int64_t k, bool interleaved) {
    const Features features{n, interleaved};
    return scales_bytes(features) + features.num_panels<Int8Layout>() * panel_elements<Int8Layout>(k);
}

void load_weight(void* packed, const WeightRows& rows) {
    float* scales = static_cast<float*>(packed);
    int8_t* panels = static_cast<int8_t*>(packed) + scales_bytes({rows.n, rows.interleaved});
    const int64_t padded = round_up(rows.k, Int8Layout::kStep);
    with_dtype(rows.source_dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        for_vectors_of_rows<Int8Layout>(rows, [&](int64_t panel, int64_t first, int64_t last, int64_t row) {
            int8_t* to = panels + panel * panel_elements<Int8Layout>(rows.k);
            int8_t* q = static_cast<int8_t*>(thread_scratch(1, size_t(padded)));
            for (int64_t column = first; column < last; ++column, ++row) {
                const S* source = static_cast<const S*>(rows.source) + row * rows.source_stride;
                const RowScale scale = scale_of(source, rows.k);
                quantise(q, source, rows.k, padded, scale.reciprocal);
                scales[panel * Int8Layout::kPanel + column] = scale.scale;
                for (int64_t i = 0; i < padded; i += 4) std::memcpy(to + Int8Layout::offset(column, i), q + i, 4);
            }
        });
    });
}

void gather(DType dtype, void* out, const void* packed, int64_t n, int64_t k, const int64_t* ids, int64_t num_ids) {
    const float* scales = static_cast<const float*>(packed);
    const int8_t* panels = static_cast<const int8_t*>(packed) + scales_bytes({n, false});
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(num_ids, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t column = ids[i] % Int8Layout::kPanel;
                const int8_t* panel = panels + ids[i] / Int8Layout::kPanel * panel_elements<Int8Layout>(k);
                T* to = static_cast<T*>(out) + i * k;
                for (int64_t j = 0; j < k; ++j)
                    to[j] = from_float<T>(float(panel[Int8Layout::offset(column, j)]) * scales[ids[i]]);
            }
        });
    });
}

// ---- multiplying ----

const int8_t* panels_of(const LinearCall& call) {
    return static_cast<const int8_t*>(call.packed) + scales_bytes({call.n, call.epilogue == Epilogue::silu_mul});
}

struct Int8Kernel : Int8Rows {
#if defined(__AMX_INT8__)
    static void run(const LinearCall& call, const ScaledBlock<int8_t>& block, int64_t first_row, const Panels& panels) {
        multiply_panels<Int8Product>(
            call, block, first_row, panels_of(call), panel_elements<Layout>(call.k), panels,
            [&](int64_t panel, int64_t row, const float* data) {
                return Int8Sums{reinterpret_cast<const int32_t*>(data), 16, kTileSums, block.scales + row,
                                scales_of_panel(call, panel)};
            });
    }
#else
    static void run(const LinearCall& call, const ScaledBlock<A>& block, int64_t first_row, const Panels& panels) {
        const int64_t size = panel_elements<Layout>(call.k);
        for (int64_t p = panels.first; p < panels.end; ++p) {
            const PanelEnd<kVectors> panel_end(call, p);
            const float* scales = scales_of_panel(call, p);
            multiply(block, panels_of(call) + p * size, [&](const int32_t* sums, int64_t row, int64_t rows) {
                panel_end.finish(Int8Sums{sums, Layout::kPanel, kLanes, block.scales + row, scales}, first_row + row,
                                 rows);
            });
        }
    }
#endif
};

void multiply(const LinearCall& call) { multiply_blocks<Int8Kernel>(call); }

}  // namespace

const LinearKernels int8_linear_kernels = {&packed_bytes, &load_weight, &gather, &multiply};

}  // namespace minivllm::MINIVLLM_ISA
