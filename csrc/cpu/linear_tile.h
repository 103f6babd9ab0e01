// What the families of linear kernels (fused multiply-add, AMX) share: panels, packing, the loop over blocks of
// rows, and the step from sums to the output. Included by linear*.cpp only; see isa.h.
//
// A packed weight is a row of panels; a panel holds `Layout::kPanel` output features, all of K, in the order the
// kernel reads it. Where an element lies depends on its own (n, k) alone, so rows can be packed in any order.
#pragma once

#include <type_traits>

#include "isa.h"
#include "leaders.h"
#include "linear.h"
#include "rms_norm_row.h"
#include "silu.h"
#include "thread_pool.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Blocks of x, measured on AMX: more bytes do not stay in a core's L2 of 2 MiB; the output of more rows, a page each,
// does not stay in the TLB.
constexpr int64_t kBlockBytes = 768 << 10;
constexpr int64_t kMaxBlockRows = 320;
constexpr int64_t kOwnRows = 256;                 // enough for a thread to read all of the weight meanwhile
constexpr int64_t kMultipliesPerThread = 1 << 16;  // below this, waking another thread costs more than it saves
constexpr int64_t kLargeOutputBytes = 8 << 20;     // more than stays in the cores' own caches
constexpr int64_t kPanelsPerCopy = 16;             // from here on a thread prepares x for itself: nobody waits for it
constexpr int64_t kHeadsBytes = 64 << 10;          // of heads that are finished together, or one that is larger
constexpr int64_t kPiecesPerThread = 8;            // a thread that is held up leaves its later pieces to the others

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- where features lie ----

// Output features lie in the panels in vectors of kLanes. With `interleaved`, vectors of the weight's first and
// second half alternate, so that a gate and its up meet in one panel.
struct Features {
    int64_t n;
    bool interleaved;

    int64_t half() const { return interleaved ? n / 2 : n; }
    int64_t num_vectors() const { return round_up(half(), kLanes) / kLanes * (interleaved ? 2 : 1); }
    template <class Layout>
    int64_t num_panels() const {
        return round_up(num_vectors() * kLanes, Layout::kPanel) / Layout::kPanel;
    }
    // The first feature of a vector.
    int64_t first(int64_t vector) const {
        return interleaved ? vector / 2 * kLanes + vector % 2 * half() : vector * kLanes;
    }
    // Features in a vector: kLanes, or fewer (none) at the end of a half.
    int64_t count(int64_t vector) const {
        const int64_t left = half() - (interleaved ? vector / 2 : vector) * kLanes;
        return left < 0 ? 0 : left < kLanes ? left : kLanes;
    }
    int64_t vector_of(int64_t feature) const {
        if (!interleaved) return feature / kLanes;
        return feature < half() ? feature / kLanes * 2 : (feature - half()) / kLanes * 2 + 1;
    }
};

template <class Layout>
int64_t panel_elements(int64_t k) {
    return Layout::kPanel * round_up(k, Layout::kStep);
}

// ---- packing ----

// Converts n elements and adds zeros up to `padded`.
template <class A, class X>
MINIVLLM_INLINE void convert_row(A* to, const X* from, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = from_float<A>(to_float(from[i]));
    for (; i < padded; ++i) to[i] = from_float<A>(0.0f);
}

// Packs columns [first, last) of one panel from rows of S. K is padded with zeros to the layout's step: the
// padding of x is zero too, but 0 × (whatever was there) need not be.
template <class Layout, class W, class S>
void pack_columns(W* panel, const S* source, int64_t source_stride, int64_t first, int64_t last, int64_t k) {
    constexpr int64_t kBlock = 256;  // a block of a panel stays in cache while its columns are written
    const int64_t padded = round_up(k, Layout::kStep);
    for (int64_t begin = 0; begin < padded; begin += kBlock) {
        const int64_t end = begin + kBlock < padded ? begin + kBlock : padded;
        const int64_t real = end < k ? end : k;
        for (int64_t column = first; column < last; ++column) {
            const S* row = source + (column - first) * source_stride;
            for (int64_t i = begin; i < real; ++i) {
                W& to = panel[Layout::offset(column, i)];
                if constexpr (sizeof(to) == 2 && std::is_same_v<W, S>) to = row[i];
                else to = from_float<W>(to_float(row[i]));
            }
            for (int64_t i = real; i < end; ++i) panel[Layout::offset(column, i)] = from_float<W>(0.0f);
        }
    }
}

// Calls fn(panel, first column, last column, first source row) for the vectors that the rows fill, in parallel.
template <class Layout, class F>
void for_vectors_of_rows(const WeightRows& rows, const F& fn) {
    const Features features{rows.n, rows.interleaved};
    constexpr int64_t kVectors = Layout::kPanel / kLanes;
    auto pack_range = [&](int64_t start, int64_t end) {  // within one half
        if (start >= end) return;
        const int64_t first = features.vector_of(start), step = rows.interleaved ? 2 : 1;
        const int64_t count = (features.vector_of(end - 1) - first) / step + 1;
        parallel_for(count, 1, [&](int64_t begin_vector, int64_t end_vector) {
            for (int64_t i = begin_vector; i < end_vector; ++i) {
                const int64_t vector = first + i * step, base = features.first(vector);
                const int64_t from = start > base ? start - base : 0;
                const int64_t to = end - base < kLanes ? end - base : kLanes;
                const int64_t column = vector % kVectors * kLanes;
                fn(vector / kVectors, column + from, column + to, base + from - rows.start);
            }
        });
    };
    const int64_t end = rows.start + rows.rows, half = features.half();
    pack_range(rows.start, end < half ? end : half);
    pack_range(rows.start > half ? rows.start : half, end);
}

template <class Layout, class W>
void load_rows(void* packed, const WeightRows& rows) {
    with_dtype(rows.source_dtype, [&](auto tag) {
        using S = typename decltype(tag)::type;
        for_vectors_of_rows<Layout>(rows, [&](int64_t panel, int64_t first, int64_t last, int64_t row) {
            W* to = static_cast<W*>(packed) + panel * panel_elements<Layout>(rows.k);
            const S* source = static_cast<const S*>(rows.source) + row * rows.source_stride;
            if constexpr (Layout::kHasFastPack) {
                if (last - first == kLanes) return Layout::pack(to, source, rows.source_stride, first, rows.k);
            }
            pack_columns<Layout>(to, source, rows.source_stride, first, last, rows.k);
        });
    });
}

template <class Layout, class W>
void gather_rows(void* out, const void* packed, int64_t k, const int64_t* ids, int64_t num_ids) {
    parallel_for(num_ids, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const W* panel = static_cast<const W*>(packed) + ids[i] / Layout::kPanel * panel_elements<Layout>(k);
            W* to = static_cast<W*>(out) + i * k;
            // Its elements lie in as many lines as there are, or half: all are asked for before one is waited for.
            for (int64_t j = 0; j < k; j += 2)
                _mm_prefetch(reinterpret_cast<const char*>(panel + Layout::offset(ids[i] % Layout::kPanel, j)),
                             _MM_HINT_T0);
            for (int64_t j = 0; j < k; ++j) to[j] = panel[Layout::offset(ids[i] % Layout::kPanel, j)];
        }
    });
}

// ---- from sums to the output ----

// float32 sums of some rows and one panel: vector v of row r lies at data + r·row_stride + v·vector_stride.
struct FloatSums {
    const float* data;
    int64_t row_stride, vector_stride;
    MINIVLLM_INLINE Vec at(int64_t r, int64_t v) const { return load(data + r * row_stride + v * vector_stride); }
};

MINIVLLM_INLINE Vec load_up_to(const float* p, int64_t n) { return n == kLanes ? load(p) : load_partial(p, int(n)); }
template <class T>
MINIVLLM_INLINE Vec load_up_to(const T* p, int64_t n) { return n == kLanes ? load(p) : load_partial(p, int(n)); }
template <class T>
MINIVLLM_INLINE void store_up_to(T* p, Vec x, int64_t n) { n == kLanes ? store(p, x) : store_partial(p, x, int(n)); }

// A whole vector past the caches: a large output would be fetched into them, line by line, only to be overwritten.
template <class T>
MINIVLLM_INLINE void store_past_caches(T* p, Vec x) {
    alignas(64) T lanes[kLanes];
    store(lanes, x);
    constexpr int kBytes = kLanes * int(sizeof(T));
    if constexpr (kBytes >= 32)
        for (int i = 0; i < kBytes; i += 32)
            _mm256_stream_si256((__m256i*)((char*)p + i), _mm256_load_si256((const __m256i*)((char*)lanes + i)));
    else _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)lanes));
}

// What is added to the sums of one panel: the bias, in float32, zeros where there is none; and where the panel's
// vectors belong.
template <int kVectors>
struct PanelEnd {
    const LinearCall* call;
    int64_t first[kVectors], count[kVectors];  // features of each vector
    alignas(64) float bias[kVectors * kLanes];
    bool past_caches;

    PanelEnd() = default;
    PanelEnd(const LinearCall& call, int64_t panel) : call(&call), past_caches(is_past_caches(call)) {
        const Features features{call.n, call.epilogue == Epilogue::silu_mul};
        for (int v = 0; v < kVectors; ++v) {
            first[v] = features.first(panel * kVectors + v);
            count[v] = features.count(panel * kVectors + v);
        }
        for (float& b : bias) b = 0.0f;
        if (call.bias == nullptr) return;
        with_dtype(call.bias_dtype, [&](auto tag) {
            using B = typename decltype(tag)::type;
            for (int v = 0; v < kVectors; ++v)
                for (int64_t i = 0; i < count[v]; ++i)
                    bias[v * kLanes + i] = to_float(static_cast<const B*>(call.bias)[first[v] + i]);
        });
    }

    template <class Sums>
    MINIVLLM_INLINE Vec value(const Sums& sums, int64_t r, int v, int64_t row) const {
        Vec x = sums.at(r, v);
        if (call->addend != nullptr) x = x + load_up_to(call->addend + row * call->addend_stride + first[v], count[v]);
        return x + load(bias + v * kLanes);
    }

    // Rows [0, num_rows) of the sums are rows row, row + 1, … of the output.
    template <class Sums>
    void finish(const Sums& sums, int64_t row, int64_t num_rows) const {
        if (call->epilogue == Epilogue::lead) {
            for (int64_t r = 0; r < num_rows; ++r) finish_leader(sums, r, row + r);
            return;
        }
        with_dtype(call->out_dtype, [&](auto tag) {
            using Y = typename decltype(tag)::type;
            for (int64_t r = 0; r < num_rows; ++r)
                finish_row(sums, r, row + r, static_cast<Y*>(call->out) + (row + r) * call->out_stride);
        });
    }

    template <class Sums, class Y>
    MINIVLLM_INLINE void finish_row(const Sums& sums, int64_t r, int64_t row, Y* out) const {
        if (call->epilogue == Epilogue::silu_mul) {
            if constexpr (kVectors % 2 == 0)
                for (int v = 0; v < kVectors && count[v] > 0; v += 2) {
                    const Vec gate = rounded<Y>(value(sums, r, v, row)), up = rounded<Y>(value(sums, r, v + 1, row));
                    store_up_to(out + first[v], silu_mul<Y>(gate, up), count[v]);
                }
            return;
        }
        for (int v = 0; v < kVectors && count[v] > 0; ++v) {
            Vec x = value(sums, r, v, row);
            if (call->epilogue == Epilogue::add_residual)
                x = load_up_to(out + first[v], count[v]) + rounded<Y>(x);
            if (past_caches && count[v] == kLanes) store_past_caches(out + first[v], x);
            else store_up_to(out + first[v], x, count[v]);
        }
    }

    template <class Sums>
    MINIVLLM_INLINE void finish_leader(const Sums& sums, int64_t r, int64_t row) const {
        Leader& leader = static_cast<Leader*>(call->out)[row];
        for (int v = 0; v < kVectors; ++v)
            take_outputs(leader, sums.at(r, v) + load(bias + v * kLanes), first[v], count[v]);
    }

    static bool is_past_caches(const LinearCall& call) {
        const int64_t size = size_of(call.out_dtype), row_bytes = call.out_stride * size;
        return call.epilogue == Epilogue::store && call.m * row_bytes >= kLargeOutputBytes && row_bytes % 64 == 0 &&
               reinterpret_cast<uintptr_t>(call.out) % 64 == 0;
    }
};

// ---- the loop over blocks of rows ----

// Rows of x as a kernel prepares them: as they lie, or normed. For one thread, while nothing else uses its scratch
// slot 1.
template <class X>
class InputRows {
public:
    explicit InputRows(const LinearCall& call)
        : call_(call), normed_(call.norm.weight == nullptr ? nullptr : thread_scratch(1, size_t(call.k) * sizeof(X))) {}

    // Valid until the next one is asked for.
    MINIVLLM_INLINE const X* row(int64_t r) const {
        const X* x = static_cast<const X*>(call_.x) + r * call_.x_stride;
        if (normed_ == nullptr) return x;
        const RowNorm& norm = call_.norm;
        if (norm.weight_dtype == DType::f32)
            norm_row(to(), x, static_cast<const float*>(norm.weight), call_.k, norm.eps);
        else norm_row(to(), x, static_cast<const X*>(norm.weight), call_.k, norm.eps);
        return to();
    }

private:
    X* to() const { return static_cast<X*>(normed_); }

    const LinearCall& call_;
    void* const normed_;
};

// Rows of x in the type, and with the padding of K, that a kernel reads.
template <class A>
struct Block {
    const A* rows;
    int64_t num_rows, stride, k;  // k includes the padding
};

// Panels [first, end) of a weight, for one thread, which is likely to go on to `likely_end`.
struct Panels {
    int64_t first, end, likely_end;
};

// How rows are cut into blocks, of whole groups of Kernel::kRows. A block fits in L2: it stays while panels pass.
struct Blocks {
    int64_t m, group_rows, num_groups, count;
    bool is_one_thread;  // each block is one thread's; else all share each

    template <class Kernel>
    static Blocks of(const LinearCall& call, int64_t padded) {
        const int64_t fitting = kBlockBytes / (padded * int64_t(sizeof(typename Kernel::A)));
        int64_t most = (fitting < kMaxBlockRows ? fitting : kMaxBlockRows) / Kernel::kRows;
        if (most < 1) most = 1;
        Blocks blocks{call.m, Kernel::kRows, (call.m + Kernel::kRows - 1) / Kernel::kRows, 0, false};
        blocks.count = (blocks.num_groups + most - 1) / most;
        // With blocks of one's own nobody waits for anybody, but each thread reads all of the weight.
        blocks.is_one_thread = num_threads() > 1 && call.m >= kOwnRows * num_threads();
        if (blocks.is_one_thread) blocks.count = round_up(blocks.count, num_threads());
        return blocks;
    }
    int64_t first_row(int64_t block) const {
        const int64_t row = num_groups * block / count * group_rows;
        return row < m ? row : m;
    }
};

constexpr int64_t greatest_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// The fewest panels that one thread does: such that they are whole heads, where that matters.
template <class Layout>
int64_t unit_panels(const LinearCall& call) {
    if (call.epilogue != Epilogue::heads) return 1;
    return call.heads->write.layout.head_dim / greatest_divisor(call.heads->write.layout.head_dim, Layout::kPanel);
}

// Kernel::run of panels that are whole heads, as many as stay in the cache, and then what is to become of these.
template <class Kernel, class Rows>
void run_heads(const LinearCall& call, const Rows& block, int64_t first_row, const Panels& panels) {
    constexpr int64_t kPanel = Kernel::Layout::kPanel;
    const int64_t size = size_of(call.out_dtype), unit = unit_panels<typename Kernel::Layout>(call);
    const int64_t fitting = kHeadsBytes / (block.num_rows * unit * kPanel * size);
    const int64_t together = fitting > 1 ? fitting * unit : unit;
    const int64_t columns = (together < panels.end - panels.first ? together : panels.end - panels.first) * kPanel;
    LinearCall part = call;  // of this block's rows alone
    part.m = block.num_rows, part.epilogue = Epilogue::store, part.out_stride = columns;
    if (call.addend != nullptr) part.addend = call.addend + first_row * call.addend_stride;
    char* room = static_cast<char*>(thread_scratch(2, size_t(block.num_rows * columns * size)));
    for (int64_t p = panels.first; p < panels.end; p += together) {
        const int64_t end = p + together < panels.end ? p + together : panels.end, column = p * kPanel;
        part.out = room - column * size;
        Kernel::run(part, block, 0, {p, end, panels.likely_end});
        const int64_t last = end * kPanel < call.n ? end * kPanel : call.n;
        call.heads->kernels->finish(call, room, columns, column, last - column, first_row, block.num_rows);
    }
}

// Kernel::run, but that a thread finds leaders for itself and then lets the others know.
template <class Kernel, class Rows>
void run_panels(const LinearCall& call, const Rows& block, int64_t first_row, const Panels& panels) {
    if (call.epilogue == Epilogue::heads) return run_heads<Kernel>(call, block, first_row, panels);
    if (call.epilogue != Epilogue::lead) return Kernel::run(call, block, first_row, panels);
    const OwnLeaders own(static_cast<Leader*>(call.out) + first_row, block.num_rows);
    LinearCall own_call = call;
    own_call.out = own.data() - first_row;
    Kernel::run(own_call, block, first_row, panels);
    own.merge();
}

// Kernel::prepare(call, first_row, num_rows) for blocks of rows, then Kernel::run(call, block, first_row, panels). Each
// output is one thread's, and is summed over all of K in the kernel's own order: neither the blocks nor the threads can
// be seen in the result.
template <class Kernel>
void multiply_blocks(const LinearCall& call) {
    using Layout = typename Kernel::Layout;
    const int64_t padded = round_up(call.k, Layout::kStep);
    const Blocks blocks = Blocks::of<Kernel>(call, padded);
    const int64_t num_panels = Features{call.n, call.epilogue == Epilogue::silu_mul}.template num_panels<Layout>();
    const int64_t unit = unit_panels<Layout>(call), num_units = (num_panels + unit - 1) / unit;
    if (blocks.is_one_thread) {
        parallel_tasks(blocks.count, [&](int64_t b) {
            const int64_t first = blocks.first_row(b), rows = blocks.first_row(b + 1) - first;
            run_panels<Kernel>(call, Kernel::prepare(call, first, rows), first, {0, num_panels, num_panels});
            _mm_sfence();  // of what went past the caches
        });
        return;
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t first = blocks.first_row(b), rows = blocks.first_row(b + 1) - first;
        const int64_t least = 1 + kMultipliesPerThread / (rows * padded * Layout::kPanel * unit);
        const int64_t piece = num_units / (num_threads() * kPiecesPerThread);
        const auto share_out = [&](const auto& prepare) {
            parallel_shares(num_units, piece > least ? piece : least, prepare,
                            [&](const auto& block, int64_t begin, int64_t end, int64_t share_end) {
                                const auto panel = [&](int64_t u) { return u * unit < num_panels ? u * unit : num_panels; };
                                run_panels<Kernel>(call, block, first, {panel(begin), panel(end), panel(share_end)});
                                _mm_sfence();
                            });
        };
        if (num_panels >= kPanelsPerCopy * num_threads()) {
            share_out([&] { return Kernel::prepare(call, first, rows); });
        } else {
            const auto block = Kernel::prepare(call, first, rows);
            share_out([&] { return block; });
        }
    }
}

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
