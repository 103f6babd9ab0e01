// Matrix products on AMX tiles, in bfloat16 and in int8; and linear layers in bfloat16. Included by linear*.cpp only.
//
// A bfloat16 tile product adds, for each of 16 rows and 16 columns, 16 pairs of products to a float32 sum, in an order
// that is the processor's and the same for every row, however many rows the tile has. Subnormal inputs and results
// count as zero, as always with AMX. An int8 one adds 64 products to an int32 sum, exactly.
//
// Two row tiles by two column tiles of sums use four loads for four products. One operand's loads must come from L1 for
// the products to be the limit, so K is cut into chunks: as all rows pass a chunk of a panel, half of it stays in L1;
// the other half and the rows are loaded with the streaming hint, which leaves it there. Between chunks, sums wait in
// memory, exactly. What becomes of finished sums is done a row at a time between the products of the rows after them,
// where the processor has room for it.
#pragma once

#include "linear_tile.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int64_t kTileSums = 256;     // float32 or int32 in a tile
constexpr int64_t kGroupRows = 32;     // rows of x at a time, two tiles
constexpr int64_t kChunkSteps = 32;    // of K at a time: 64 KiB of a panel
constexpr int64_t kHeldSteps = 16;     // of them, those that stay in L1: 32 KiB
constexpr int64_t kWarmSteps = 8;      // between stores of tiles: see AmxPanels::keep_warm
constexpr int64_t kAheadBytes = 16384;  // how far ahead of a thin product the weight is fetched
constexpr int64_t kTouchRows = 8;       // up to here it is touched instead
constexpr int64_t kAheadRows = 8;       // how far ahead the lines of the output are fetched, to be written

// [K/32][2 column groups][16 pairs of k][16 columns][2]: each [16][16][2] is one tile, 1 KiB.
struct AmxLayout {
    static constexpr int64_t kPanel = 32, kStep = 32;
    static constexpr bool kHasFastPack = true;
    static MINIVLLM_INLINE int64_t offset(int64_t column, int64_t k) {
        return k / 32 * 1024 + column / 16 * 512 + k % 32 / 2 * 32 + column % 16 * 2 + k % 2;
    }

    // 16 whole columns from `first` on: a tile is 16 rows of 16 pairs, transposed.
    template <class S>
    static void pack(bf16* panel, const S* source, int64_t stride, int64_t first, int64_t k) {
        alignas(64) bf16 rows[16][32];
        for (int64_t i = 0; i < k; i += kStep) {
            Vec pairs[16];
            for (int r = 0; r < 16; ++r) {
                const S* from = source + r * stride + i;
                if (std::is_same_v<S, bf16> && k - i >= kStep) {
                    std::memcpy(&pairs[r], from, 64);
                } else {
                    convert_exactly(rows[r], from, k - i < kStep ? k - i : kStep);
                    std::memcpy(&pairs[r], rows[r], 64);
                }
            }
            transpose(pairs);
            bf16* tile = panel + offset(first, i);
            for (int p = 0; p < 16; ++p) std::memcpy(tile + p * 32, &pairs[p], 64);
        }
    }

private:
    // Up to 32 elements and zeros; bfloat16 keeps its bits, whatever they mean.
    template <class S>
    static void convert_exactly(bf16* to, const S* from, int64_t n) {
        for (int64_t i = 0; i < 32; ++i) to[i] = bf16{0};
        for (int64_t i = 0; i < n; ++i) {
            if constexpr (std::is_same_v<S, bf16>) to[i] = from[i];
            else to[i] = from_float<bf16>(to_float(from[i]));
        }
    }
};

// Tiles 0 to 3 hold sums, [upper, lower rows] × [left, right columns]; 4 and 5 rows of x; 6 and 7 weights.
// While an object of it lives, the thread's tiles are shaped for `rows` rows.
class TileShapes {
public:
    explicit TileShapes(int rows) {
        alignas(64) Config config{};
        config.palette = 1;
        for (int t = 0; t < 8; ++t) {
            config.rows[t] = uint8_t(t < 6 ? rows : 16);
            config.column_bytes[t] = 64;
        }
        asm volatile("" ::: "memory");  // gcc believes the next line reads 8 bytes, and drops the stores to the rest
        _tile_loadconfig(&config);
    }
    ~TileShapes() { _tile_release(); }

private:
    struct Config {  // as the processor reads it
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
};

// Fetches what comes next of a weight, some lines at each step, in several places at once: the processor's own fetching
// follows each of them only some lines ahead, and prefetches that wait for memory hold the few buffers that tile loads
// need as well. For thin products into L1, as it is read soon and once; else into L2.
template <bool kThin, int64_t kPlaces = 4>
struct Ahead {
    static constexpr bool kIsThin = kThin;

    const char* next;  // kPlaces parts from here on are being fetched, or were
    const char* end;
    int64_t part;      // bytes
    int64_t lines;     // a step, of each part
    int64_t done = 0;  // bytes of each part

    static Ahead thin(const char* next, const char* end) { return {next, end, 4096, 8}; }
    // All of [next, end) in about num_steps steps.
    static Ahead thick(const char* next, const char* end, int64_t num_steps) {
        const int64_t bytes = end > next ? end - next : 0, lines = (bytes / 64 + kPlaces - 1) / kPlaces;
        return {next, end, lines * 64, (lines + num_steps - 1) / num_steps};
    }

    MINIVLLM_INLINE void step() {
        if (next >= end) return;
        for (int64_t i = 0; i < lines; ++i, done += 64)
            for (int64_t p = 0; p < kPlaces; ++p) _mm_prefetch(next + p * part + done, kThin ? _MM_HINT_T0 : _MM_HINT_T1);
        if (done < part) return;
        next += kPlaces * part;
        done = 0;
    }
    MINIVLLM_INLINE void before_tile(const void*) {}
};

// The same for a few rows: before each tile of the weight is loaded, the KiB behind it is touched.
struct Touch {
    static constexpr bool kIsThin = true;

    const char* end;  // of what may be read: whole tiles

    MINIVLLM_INLINE void step() {}
    MINIVLLM_INLINE void before_tile(const void* tile) {
        const char* kib = static_cast<const char*>(tile) + 1024;
        if (kib < end) touch_kib(kib);
    }
};

// The tile products of an element type; a step of K is one tile's row.
struct Bf16Product {
    using Element = bf16;
    static MINIVLLM_INLINE void upper_left() { _tile_dpbf16ps(0, 4, 6); }
    static MINIVLLM_INLINE void upper_right() { _tile_dpbf16ps(1, 4, 7); }
    static MINIVLLM_INLINE void lower_left() { _tile_dpbf16ps(2, 5, 6); }
    static MINIVLLM_INLINE void lower_right() { _tile_dpbf16ps(3, 5, 7); }
};
struct Int8Product {
    using Element = int8_t;
    static MINIVLLM_INLINE void upper_left() { _tile_dpbssd(0, 4, 6); }
    static MINIVLLM_INLINE void upper_right() { _tile_dpbssd(1, 4, 7); }
    static MINIVLLM_INLINE void lower_left() { _tile_dpbssd(2, 5, 6); }
    static MINIVLLM_INLINE void lower_right() { _tile_dpbssd(3, 5, 7); }
};

// Operands of the products, loaded with the hint that their memory need not stay in L1, or without.
MINIVLLM_INLINE void load_upper(const void* from, bool stays) {
    if (stays) _tile_loadd(4, from, 64);
    else _tile_stream_loadd(4, from, 64);
}
MINIVLLM_INLINE void load_lower(const void* from, bool stays) {
    if (stays) _tile_loadd(5, from, 64);
    else _tile_stream_loadd(5, from, 64);
}
MINIVLLM_INLINE void load_left(const void* from, bool stays) {
    if (stays) _tile_loadd(6, from, 64);
    else _tile_stream_loadd(6, from, 64);
}
MINIVLLM_INLINE void load_right(const void* from, bool stays) {
    if (stays) _tile_loadd(7, from, 64);
    else _tile_stream_loadd(7, from, 64);
}

// A block of rows times panels, one after the other. The block: [rows/32][K/step][2 row groups] tiles of [16][step]; a
// panel: [K/step][2 column groups] tiles. Sums are float32 or int32, tiles of [16][16], kept as their bits.
//
// End: what becomes of a panel's sums. end.finish_row(sums, row): of a row of the block, whose left 16 sums are at `sums`
// and right 16 kTileSums further.
template <class Product, class End>
class AmxPanels {
public:
    using Element = typename Product::Element;
    static constexpr int64_t kTile = 1024 / sizeof(Element), kStep = 64 / sizeof(Element);
    static constexpr int64_t kRows = kGroupRows;

    // `fetch_end`: of what this thread is likely to read of the weight, here or next; nothing behind it is loaded for nothing.
    AmxPanels(const Block<Element>& block, const Element* fetch_end)
        : block_(block), fetch_end_(reinterpret_cast<const char*>(fetch_end)), steps_(block.k / kStep),
          num_groups_((block.num_rows + kRows - 1) / kRows),
          sums_(static_cast<float*>(thread_scratch(1, size_t(num_groups_ + 2) * kGroupSums * sizeof(float)))) {}

    // Adds up the next panel, and finishes most of the one before.
    void multiply(const Element* panel, const End& end) {
        if (num_groups_ == 1) thin(panel, end);
        else if (num_groups_ == 2) thick<8>(panel, end);
        else thick<4>(panel, end);
    }

    // Finishes what is left of the last panel.
    void flush() { late_.finish_all(); }

private:
    static constexpr int64_t kGroupSums = 4 * kTileSums;

    // The finished sums of a group, whose rows go on to the output little by little.
    struct Late {
        End end;
        const float* sums;
        int64_t row, num_rows, done;
        int64_t due;  // rows that should be done by now, in parts of a step

        // To be called num_steps times.
        MINIVLLM_INLINE void step(int64_t num_steps) {
            due += num_rows;
            for (; due >= num_steps && done < num_rows; due -= num_steps) finish_next();
        }
        MINIVLLM_INLINE void finish_all() {
            while (done < num_rows) finish_next();
        }
        MINIVLLM_INLINE void finish_next() {
            end.finish_row(sums + done / 16 * 2 * kTileSums + done % 16 * 16, row + done);
            ++done;
        }
    };

    void thin(const Element* panel, const End& end) {
        float* sums = sums_ + which_ * kGroupSums;
        which_ ^= 1;
        if (block_.num_rows <= kTouchRows) {
            Touch touch{fetch_end_};
            add_products(sums, true, 0, 0, steps_, panel, touch);
        } else {
            auto ahead = Ahead<true>::thin(reinterpret_cast<const char*>(panel) + kAheadBytes, fetch_end_);
            add_products(sums, true, 0, 0, steps_, panel, ahead);
        }
        late_.finish_all();
        late_ = {end, sums, 0, block_.num_rows, 0, 0};
    }

    // kPlaces: to fetch from at a time (measured: with two groups eight are better than four, with more they are worse).
    template <int64_t kPlaces>
    void thick(const Element* panel, const End& end) {
        for (int64_t first = 0; first < steps_; first += kChunkSteps) {
            const int64_t steps = steps_ - first < kChunkSteps ? steps_ - first : kChunkSteps;
            const Element* chunk = panel + first * 2 * kTile;
            const char* next = reinterpret_cast<const char*>(chunk + steps * 2 * kTile);
            // The next chunk; a panel's last one is followed by another panel's first.
            const int64_t left = steps_ - first - steps, coming = left > 0 ? left : steps_;
            const char* last = next + (coming < kChunkSteps ? coming : kChunkSteps) * 2048;
            auto ahead = Ahead<false, kPlaces>::thick(next, last < fetch_end_ ? last : fetch_end_, steps * num_groups_);
            for (int64_t g = 0; g < num_groups_; ++g) {
                float* sums = sums_ + g * kGroupSums;
                add_products(sums, first == 0, g, first, steps, chunk, ahead);
                late_.finish_all();
                if (first + steps < steps_) continue;
                const int64_t rows = block_.num_rows - g * kRows;
                late_ = {end, sums, g * kRows, rows < kRows ? rows : kRows, 0, 0};
            }
        }
    }

    // Adds steps [first, first + steps) of K for the rows of group g, fetching by Ahead or Touch.
    template <class Fetch>
    MINIVLLM_INLINE void add_products(float* sums, bool are_zero, int64_t g, int64_t first, int64_t steps,
                                      const Element* w, Fetch& fetch) {
        const Element* x = block_.rows + g * block_.stride + first * 2 * kTile;
        if (block_.num_rows - g * kRows > 16) add_products<4>(sums, are_zero, x, w, steps, fetch);
        else add_products<2>(sums, are_zero, x, w, steps, fetch);
    }

    // sums: kTiles tiles in the order of the tile registers.
    template <int kTiles, class Fetch>
    MINIVLLM_INLINE void add_products(float* sums, bool are_zero, const Element* x, const Element* w, int64_t steps,
                                      Fetch& fetch) {
        constexpr bool kThin = Fetch::kIsThin;
        load_sums<kTiles>(sums, are_zero);
        for (int64_t s = 0; s < steps; ++s, x += 2 * kTile, w += 2 * kTile) {
            fetch.step();
            // What is read again stays in L1: the rows of a thin product, the first half of a thick one's chunk.
            const bool is_held = !kThin && s < kHeldSteps;
            load_upper(x, kThin);
            fetch.before_tile(w);
            load_left(w, is_held);
            Product::upper_left();
            fetch.before_tile(w + kTile);
            load_right(w + kTile, is_held);
            Product::upper_right();
            if constexpr (kTiles == 4) {
                load_lower(x + kTile, kThin);
                Product::lower_left();
                Product::lower_right();
            }
            if (s % kWarmSteps == kWarmSteps - 1) keep_warm();
            late_.step(steps);
        }
        store_sums<kTiles>(sums);
    }

    // A store of a tile takes 0.3 µs when the last one was more than about a microsecond ago, and next to nothing
    // otherwise (measured): so one that nobody reads now and then.
    MINIVLLM_INLINE void keep_warm() const { _tile_stored(4, sums_ + (num_groups_ + 1) * kGroupSums, 64); }

    template <int kTiles>
    static MINIVLLM_INLINE void load_sums(const float* sums, bool are_zero) {
        if (are_zero) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (kTiles == 4) {
                _tile_zero(2);
                _tile_zero(3);
            }
            return;
        }
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + kTileSums, 64);
        if constexpr (kTiles == 4) {
            _tile_loadd(2, sums + 2 * kTileSums, 64);
            _tile_loadd(3, sums + 3 * kTileSums, 64);
        }
    }

    template <int kTiles>
    static MINIVLLM_INLINE void store_sums(float* sums) {
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + kTileSums, 64);
        if constexpr (kTiles == 4) {
            _tile_stored(2, sums + 2 * kTileSums, 64);
            _tile_stored(3, sums + 3 * kTileSums, 64);
        }
    }

    const Block<Element> block_;
    const char* const fetch_end_;
    const int64_t steps_, num_groups_;
    float* const sums_;  // of each group, or of two panels' only group; and room for keep_warm
    int which_ = 0;
    Late late_{};
};

// ---- from a row's sums to the output ----

// Two vectors of features as bfloat16, side by side.
MINIVLLM_INLINE __m512i narrow_both(Vec left, Vec right) { return (__m512i)_mm512_cvtne2ps_pbh(right.v, left.v); }
MINIVLLM_INLINE Vec left_of(__m512i both) { return widen_bf16(_mm512_castsi512_si256(both)); }
MINIVLLM_INLINE Vec right_of(__m512i both) { return widen_bf16(_mm512_extracti64x4_epi64(both, 1)); }

// `prefetchw`, which every processor with AMX has; compilers know it by a flag of its own.
MINIVLLM_INLINE void prefetch_to_write(const void* p) { asm volatile("prefetchw (%0)" ::"r"(p)); }

// What PanelEnd does, for whole panels, no addend, and the types that models have: a few instructions a row.
template <Epilogue kEpilogue, class Y>
struct PlainRow {
    template <class Sums>
    static MINIVLLM_INLINE void finish(const PanelEnd<2>& end, const Sums& sums, int64_t row) {
        Y* out = static_cast<Y*>(end.call->out) + row * end.call->out_stride + end.first[0];
        // Rows lie kilobytes apart, where the processor fetches nothing by itself: a store would wait for its line, and
        // the stores after it with it.
        if (row + kAheadRows < end.call->m && !end.past_caches)
            prefetch_to_write(out + kAheadRows * end.call->out_stride);
        const Vec left = sums.at(0, 0) + load(end.bias), right = sums.at(0, 1) + load(end.bias + kLanes);
        if constexpr (std::is_same_v<Y, float>) {
            static_assert(kEpilogue == Epilogue::store);
            store_whole(end, out, _mm512_castps_si512(left.v));
            store_whole(end, out + kLanes, _mm512_castps_si512(right.v));
        } else {
            const __m512i both = narrow_both(left, right);
            if constexpr (kEpilogue == Epilogue::store) {
                store_whole(end, out, both);
            } else if constexpr (kEpilogue == Epilogue::add_residual) {
                const __m512i before = _mm512_loadu_si512(out);
                store(out, left_of(before) + left_of(both));
                store(out + kLanes, right_of(before) + right_of(both));
            } else {
                store(out, silu_mul<bf16>(left_of(both), right_of(both)));
            }
        }
    }

private:
    static MINIVLLM_INLINE void store_whole(const PanelEnd<2>& end, void* out, __m512i line) {
        if (end.past_caches) _mm512_stream_si512(static_cast<__m512i*>(out), line);
        else _mm512_storeu_si512(out, line);
    }
};

struct AnyRow {
    template <class Sums>
    static void finish(const PanelEnd<2>& end, const Sums& sums, int64_t row) { end.finish(sums, row, 1); }
};

struct LeaderRow {
    template <class Sums>
    static MINIVLLM_INLINE void finish(const PanelEnd<2>& end, const Sums& sums, int64_t row) {
        end.finish_leader(sums, 0, row);
    }
};

// Calls fn(Row{}), of which Row::finish takes a row of a panel's sums to the output.
template <class F>
MINIVLLM_INLINE void with_row_end(const LinearCall& call, const F& fn) {
    const bool is_plain = call.addend == nullptr && call.n % 32 == 0;
    const bool is_bf16 = call.out_dtype == DType::bf16;
    if (call.epilogue == Epilogue::lead) return fn(LeaderRow{});
    if (is_plain && call.out_dtype == DType::f32 && call.epilogue == Epilogue::store)
        fn(PlainRow<Epilogue::store, float>{});
    else if (is_plain && is_bf16 && call.epilogue == Epilogue::store) fn(PlainRow<Epilogue::store, bf16>{});
    else if (is_plain && is_bf16 && call.epilogue == Epilogue::add_residual)
        fn(PlainRow<Epilogue::add_residual, bf16>{});
    else if (is_plain && is_bf16) fn(PlainRow<Epilogue::silu_mul, bf16>{});
    else fn(AnyRow{});
}

// A block times panels of `packed`, `size` elements each. sums_of(panel, row, data): what FloatSums is, of a row of the
// block whose sums lie at `data`.
template <class Product, class SumsOf>
void multiply_panels(const LinearCall& call, const Block<typename Product::Element>& block, int64_t first_row,
                     const typename Product::Element* packed, int64_t size, const Panels& run, const SumsOf& sums_of) {
    const TileShapes tiles(block.num_rows < 16 ? int(block.num_rows) : 16);
    with_row_end(call, [&](auto row_end) {
        struct End {
            PanelEnd<2> panel_end;
            const SumsOf* sums_of;
            int64_t panel, first_row;
            MINIVLLM_INLINE void finish_row(const float* sums, int64_t row) const {
                decltype(row_end)::finish(panel_end, (*sums_of)(panel, row, sums), first_row + row);
            }
        };
        AmxPanels<Product, End> panels(block, packed + run.likely_end * size);
        for (int64_t p = run.first; p < run.end; ++p)
            panels.multiply(packed + p * size, End{{call, p}, &sums_of, p, first_row});
        panels.flush();
    });
}

struct AmxKernel {
    using A = bf16;
    using Layout = AmxLayout;
    static constexpr int64_t kRows = kGroupRows;

    // x as tiles, [rows/32][K/32][2][16][32]: read in the order they lie, where rows a power of two apart would share
    // a few cache sets. Rows beyond the last are whatever they are: they meet no other row.
    static Block<bf16> prepare(const LinearCall& call, int64_t first, int64_t num_rows) {
        const int64_t k = round_up(call.k, Layout::kStep);
        bf16* tiles = static_cast<bf16*>(thread_scratch(0, round_up(num_rows, kRows) * k * sizeof(bf16)));
        parallel_for(num_rows, 1 + 32768 / k, [&](int64_t begin, int64_t end) {
            const InputRows<bf16> rows(call);
            for (int64_t row = begin; row < end; ++row) {
                const bf16* from = rows.row(first + row);
                bf16* to = tiles + row / kRows * kRows * k + row % kRows * 32;
                for (int64_t i = 0; i < k; i += 32, to += kRows * 32) {
                    if (call.k - i >= 32) std::memcpy(to, from + i, 64);
                    else convert_row(to, from + i, call.k - i, 32);
                }
            }
        });
        return {tiles, num_rows, kRows * k, k};
    }

    static void run(const LinearCall& call, const Block<bf16>& block, int64_t first_row, const Panels& panels) {
        const bf16* packed = static_cast<const bf16*>(call.packed);
        multiply_panels<Bf16Product>(
            call, block, first_row, packed, panel_elements<Layout>(call.k), panels,
            [](int64_t, int64_t, const float* data) { return FloatSums{data, 16, kTileSums}; });
    }
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
