// Linear layers whose weights are 4-bit codes, and x int8 row by row as in linear_int8.cpp.
//
// A weight is scale × multiplier × code: a float32 scale for each output feature, a whole multiplier in [1, 16] for each
// 128 of its K, and codes in [-8, 7]. So multiplier × code is an int8, products of int8 are all it takes, and the int32
// sums over all of K are exact: any order, and any place for the multiplier, gives the same bits.
//
// A packed weight: a float32 scale for each place of a feature, then the panels: multipliers, a byte each,
// [K/128][vectors of features][kLanes], to a whole line; then codes with 8 added to each, [K/64][vectors of features]
// [8 quads of k][kLanes][4] bytes: a quad's codes in the low halves, those of the quad 32 further on in the high ones.
#include "linear_int8.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kGroup = 128;      // of K, with one multiplier
constexpr int64_t kGroupSteps = kGroup / Int8Layout::kStep;
constexpr int kMostMultiplier = 16;  // × -8 is the least int8
constexpr int kMostCode = 7, kLeastCode = -8, kCodeOffset = 8;
constexpr int kTriedMultipliers = 7;
constexpr int kParts = 16;  // of a feature's scale: in such a weight is made whole first, so that errors are exact

inline int64_t num_groups(int64_t k) { return (k + kGroup - 1) / kGroup; }
inline int64_t multipliers_bytes(int64_t k) { return round_up(num_groups(k) * Int8Layout::kPanel, 64); }
inline int64_t codes_bytes(int64_t k) { return panel_elements<Int8Layout>(k) / 2; }
inline int64_t panel_bytes(int64_t k) { return multipliers_bytes(k) + codes_bytes(k); }

// Where a code lies: its byte in a panel's codes, and by how much it is shifted there.
inline int64_t code_byte(int64_t column, int64_t k) {
    return k / 64 * 32 * Int8Layout::kPanel + column / kLanes * 32 * kLanes + k % 32 / 4 * 4 * kLanes +
           column % kLanes * 4 + k % 4;
}
inline int code_shift(int64_t k) { return k % 64 < 32 ? 0 : 4; }

struct Panel4 {
    const uint8_t* multipliers;
    const uint8_t* codes;

    int multiplier(int64_t column, int64_t k) const { return multipliers[k / kGroup * Int8Layout::kPanel + column]; }
    int code(int64_t column, int64_t k) const {
        return (codes[code_byte(column, k)] >> code_shift(k) & 15) - kCodeOffset;
    }
};

inline Panel4 panel_at(const void* packed, int64_t scales_size, int64_t panel, int64_t k) {
    const uint8_t* at = static_cast<const uint8_t*>(packed) + scales_size + panel * panel_bytes(k);
    return {at, at + multipliers_bytes(k)};
}
inline Panel4 panel_of(const LinearCall& call, int64_t panel) {
    return panel_at(call.packed, scales_bytes({call.n, call.epilogue == Epilogue::silu_mul}), panel, call.k);
}

// ---- packing ----

// Of a group of n whole numbers, a multiple of kLanes, as multiples of `unit`: codes with kCodeOffset added, at `codes`
// if that is not null; and the sum of the squares of what they miss. It is exact: a lane's is less than 2^24.
int64_t encode_group(uint8_t* codes, const float* numbers, int64_t n, float unit) {
    const Vec factor = set1(1.0f / unit), least = set1(float(kLeastCode)), most = set1(float(kMostCode));
    Vec squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec number = load(numbers + i);
        const Vec code = round_even(max(least, min(most, number * factor)));
        const Vec miss = fnma(code, set1(unit), number);
        squares = fma(miss, miss, squares);
        if (codes != nullptr) store_integers(reinterpret_cast<int8_t*>(codes) + i, code + set1(float(kCodeOffset)));
    }
    alignas(64) float lanes[kLanes];
    store(lanes, squares);
    int64_t sum = 0;
    for (float lane : lanes) sum += int64_t(lane);
    return sum;
}

// The codes of a group, and its multiplier: of the least that cuts nothing off and the few below it, the one of least
// squared error, and the largest of equals.
int quantise_group(uint8_t* codes, const float* numbers, int64_t n) {
    Vec sizes = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec number = load(numbers + i);
        sizes = max(sizes, max(number, zero() - number));
    }
    const int largest = int(reduce_max(sizes)), whole = (largest + kParts * kMostCode - 1) / (kParts * kMostCode);
    const int first = whole < 1 ? 1 : whole;
    int best = first;
    int64_t least = INT64_MAX;
    for (int m = first; m > first - kTriedMultipliers && m >= 1; --m) {
        const int64_t error = encode_group(nullptr, numbers, n, float(kParts * m));
        if (error < least) least = error, best = m;
    }
    encode_group(codes, numbers, n, float(kParts * best));
    return best;
}

int64_t packed_bytes(DType, int64_t n, int64_t k, bool interleaved) {
    const Features features{n, interleaved};
    return scales_bytes(features) + features.num_panels<Int8Layout>() * panel_bytes(k);
}

void load_weight(void* packed, const WeightRows& rows) {
    constexpr float kLargest = float(kParts * kMostCode * kMostMultiplier);
    float* scales = static_cast<float*>(packed);
    const int64_t scales_size = scales_bytes({rows.n, rows.interleaved}), padded = round_up(rows.k, Int8Layout::kStep);
    with_dtype(rows.source_dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        for_vectors_of_rows<Int8Layout>(rows, [&](int64_t panel, int64_t first, int64_t last, int64_t row) {
            const Panel4 at = panel_at(packed, scales_size, panel, rows.k);
            uint8_t* multipliers = const_cast<uint8_t*>(at.multipliers);
            uint8_t* to = const_cast<uint8_t*>(at.codes);
            float* numbers = static_cast<float*>(thread_scratch(1, size_t(padded) * (sizeof(float) + 1)));
            uint8_t* codes = reinterpret_cast<uint8_t*>(numbers + padded);
            for (int64_t column = first; column < last; ++column, ++row) {
                const S* source = static_cast<const S*>(rows.source) + row * rows.source_stride;
                const RowScale scale = scale_of(source, rows.k, kLargest);
                quantise(numbers, source, rows.k, padded, scale.reciprocal);
                scales[panel * Int8Layout::kPanel + column] = scale.scale * float(kParts);
                for (int64_t i = 0; i < padded; i += kGroup)
                    multipliers[i / kGroup * Int8Layout::kPanel + column] =
                        uint8_t(quantise_group(codes + i, numbers + i, padded - i < kGroup ? padded - i : kGroup));
                for (int64_t i = 0; i < padded; i += 64)
                    for (int64_t j = i; j < i + 32; j += 4) {
                        uint32_t low, high;
                        std::memcpy(&low, codes + j, 4);
                        std::memcpy(&high, codes + j + 32, 4);
                        const uint32_t both = low | high << 4;
                        std::memcpy(to + code_byte(column, j), &both, 4);
                    }
            }
        });
    });
}

void gather(DType dtype, void* out, const void* packed, int64_t n, int64_t k, const int64_t* ids, int64_t num_ids) {
    const float* scales = static_cast<const float*>(packed);
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel_for(num_ids, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t column = ids[i] % Int8Layout::kPanel;
                const Panel4 panel = panel_at(packed, scales_bytes({n, false}), ids[i] / Int8Layout::kPanel, k);
                T* to = static_cast<T*>(out) + i * k;
                for (int64_t j = 0; j < k; ++j)
                    to[j] = from_float<T>(float(panel.code(column, j) * panel.multiplier(column, j)) * scales[ids[i]]);
            }
        });
    });
}

// ---- multiplying ----

// Steps [first, end) of a panel, 64 of K each, as the int8 numbers that `Int8Layout` has of them.
MINIVLLM_INLINE void unpack(int8_t* to, const Panel4& panel, int64_t first, int64_t end) {
    const uint8_t* codes = panel.codes + first * 32 * Int8Layout::kPanel;
    for (int64_t s = first; s < end; ++s)
        for (int v = 0; v < kVectors; ++v, to += 64 * kLanes, codes += 32 * kLanes) {
            const Multipliers multipliers(panel.multipliers + s / kGroupSteps * Int8Layout::kPanel + v * kLanes);
            for (int q = 0; q < 8; ++q)
                multipliers.unpack(to + q * 4 * kLanes, to + (q + 8) * 4 * kLanes, codes + q * 4 * kLanes);
        }
}

#if defined(__AMX_INT8__)

constexpr int64_t kStepBytes = 2048;  // two tiles
constexpr int64_t kRing = 4;  // steps of a panel that are unpacked: products read one while the next is written

struct Int4Kernel : Int8Rows {
    static void run(const LinearCall& call, const ScaledBlock<int8_t>& block, int64_t first_row, const Panels& panels) {
        with_row_end(call, [&](auto row_end) {
            using Row = decltype(row_end);
            if (block.num_rows > kRows) thick<Row>(call, block, first_row, panels);
            else thin<Row>(call, block, first_row, panels);
        });
    }

private:
    using Rows = ScaledBlock<int8_t>;

    static const char* place_of(const LinearCall& call, int64_t panel) {
        return reinterpret_cast<const char*>(panel_of(call, panel).multipliers);
    }
    static Int8Sums sums_of(const LinearCall& call, const Rows& block, int64_t panel, int64_t row,
                            const int32_t* sums) {
        return {sums, 16, kTileSums, block.scales + row, scales_of_panel(call, panel)};
    }

    // All rows are one group: a panel is unpacked between its products, a step at a time, and never leaves L1.
    template <class Row>
    static void thin(const LinearCall& call, const Rows& block, int64_t first_row, const Panels& run) {
        alignas(64) int32_t sums[4 * kTileSums];
        alignas(64) int8_t ring[kRing * kStepBytes];
        Ahead<true> ahead{place_of(call, run.first) + kAheadBytes, place_of(call, run.likely_end), 4096, 4};
        const TileShapes tiles(block.num_rows < 16 ? int(block.num_rows) : 16);
        for (int64_t p = run.first; p < run.end; ++p) {
            if (block.num_rows > 16) multiply_tiles<4>(sums, block, panel_of(call, p), ring, ahead);
            else multiply_tiles<2>(sums, block, panel_of(call, p), ring, ahead);
            const PanelEnd<2> end(call, p);
            for (int64_t r = 0; r < block.num_rows; ++r)
                Row::finish(end, sums_of(call, block, p, r, sums + r / 16 * 2 * kTileSums + r % 16 * 16),
                            first_row + r);
        }
    }

    template <int kTiles>
    static MINIVLLM_INLINE void multiply_tiles(int32_t* sums, const Rows& block, const Panel4& panel, int8_t* ring,
                                               Ahead<true>& ahead) {
        const int64_t steps = block.k / 64;
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTiles == 4) {
            _tile_zero(2);
            _tile_zero(3);
        }
        unpack(ring, panel, 0, 1);
        for (int64_t s = 0; s < steps; ++s) {
            ahead.step();
            if (s + 1 < steps) unpack(ring + (s + 1) % kRing * kStepBytes, panel, s + 1, s + 2);
            const int8_t* x = block.rows + s * kRows * 64;
            const int8_t* w = ring + s % kRing * kStepBytes;
            load_upper(x, false);
            load_left(w, false);
            Int8Product::upper_left();
            load_right(w + 1024, false);
            Int8Product::upper_right();
            if constexpr (kTiles == 4) {
                load_lower(x + 1024, false);
                Int8Product::lower_left();
                Int8Product::lower_right();
            }
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + kTileSums, 64);
        if constexpr (kTiles == 4) {
            _tile_stored(2, sums + 2 * kTileSums, 64);
            _tile_stored(3, sums + 3 * kTileSums, 64);
        }
    }

    // A panel is unpacked once for all rows of the block.
    template <class Row>
    static void thick(const LinearCall& call, const Rows& block, int64_t first_row, const Panels& run) {
        struct End {
            PanelEnd<2> panel_end;
            const Rows* block;
            int64_t panel, first_row;
            const char* fetched;  // a later panel, or null: with each row, some lines of it
            int64_t lines;
            MINIVLLM_INLINE void finish_row(const float* sums, int64_t row) const {
                if (fetched != nullptr)
                    for (int64_t i = 0; i < lines; ++i)
                        _mm_prefetch(fetched + (row * lines + i) * 64, _MM_HINT_T1);
                const int32_t* whole = reinterpret_cast<const int32_t*>(sums);
                Row::finish(panel_end, sums_of(*panel_end.call, *block, panel, row, whole), first_row + row);
            }
        };
        const int64_t lines = (panel_bytes(call.k) / 64 + block.num_rows - 1) / block.num_rows;
        int8_t* whole = static_cast<int8_t*>(thread_scratch(4, size_t(panel_elements<Layout>(call.k))));
        const TileShapes tiles(16);
        AmxPanels<Int8Product, End> panels(block, whole);
        for (int64_t p = run.first; p < run.end; ++p) {
            unpack(whole, panel_of(call, p), 0, block.k / 64);
            // Rows of this panel are finished while the next is multiplied by.
            const char* fetched = p + 2 < run.likely_end ? place_of(call, p + 2) : nullptr;
            panels.multiply(whole, End{{call, p}, &block, p, first_row, fetched, lines});
        }
        panels.flush();
    }
};

#else

struct Int4Kernel : Int8Rows {
    static void run(const LinearCall& call, const ScaledBlock<A>& block, int64_t first_row, const Panels& panels) {
        int8_t* whole = static_cast<int8_t*>(thread_scratch(1, size_t(panel_elements<Layout>(call.k))));
        for (int64_t p = panels.first; p < panels.end; ++p) {
            const PanelEnd<kVectors> panel_end(call, p);
            const float* scales = scales_of_panel(call, p);
            unpack(whole, panel_of(call, p), 0, block.k / 64);
            multiply(block, whole, [&](const int32_t* sums, int64_t row, int64_t rows) {
                panel_end.finish(Int8Sums{sums, Layout::kPanel, kLanes, block.scales + row, scales}, first_row + row,
                                 rows);
            });
        }
    }
};

#endif

void multiply(const LinearCall& call) { multiply_blocks<Int4Kernel>(call); }

}  // namespace

const LinearKernels int4_linear_kernels = {&packed_bytes, &load_weight, &gather, &multiply};

}  // namespace minivllm::MINIVLLM_ISA
