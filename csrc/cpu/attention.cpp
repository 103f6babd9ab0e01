// Paged attention kernels: one task is a tile of query rows of one request against one key-value head.
//
// What fixes a row's bits, whatever else is computed beside it:
//   - a score is one chain of fma over the head dimension, ascending;
//   - KV tiles are 32 absolute positions; within a segment of 1024 they update the row's (max, sum, output) in
//     ascending order, a position at a time; segments are merged in ascending order, the first one copied;
//   - masked positions of a tile are left out, not multiplied by zero: nothing they hold can be seen.
// Rows share loads (of converted keys and values) but no arithmetic.
#include "attention.h"

#include "thread_pool.h"
#include "vec_math.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

constexpr int kTile = int(kKvTile);
constexpr int kTileVecs = kTile / kLanes;
constexpr int64_t kMaxRows = 64;  // query rows (positions × heads of the group) a task

// Register blocks: accumulators, operands and broadcasts must fit 32 registers (AVX-512) or 16 (AVX2).
constexpr int kScoreRows = kLanes == 16 ? 8 : 2;   // × kTileVecs accumulators
constexpr int kOutputRows = kLanes == 16 ? 4 : 2;  // × kOutputVecs accumulators
constexpr int kOutputVecs = 4;

struct Task {
    int32_t request, first_query, num_queries;  // queries counted from the request's first
};

// A thread's memory for one task. Rows are position-major: row = query * group + head of the group.
struct Workspace {
    float *q, *keys, *values;           // [rows, head_dim], [head_dim, tile] (transposed), [tile, head_dim]
    float *weights;                     // [rows, tile]: scores, then softmax numerators
    float *seg_out, *seg_max, *seg_sum; // the segment's running state
    float *out, *max, *sum;             // the segments merged so far
    int64_t *begin, *end;               // positions that the row sees

    static size_t bytes(int64_t rows, int64_t head_dim) {
        return size_t(4 * (rows * (3 * head_dim + kTile + 4) + 2 * kTile * head_dim) + 16 * rows);
    }
    Workspace(void* memory, int64_t rows, int64_t head_dim) {
        float* p = static_cast<float*>(memory);
        auto take = [&p](int64_t n) { float* taken = p; p += n; return taken; };
        q = take(rows * head_dim), keys = take(kTile * head_dim), values = take(kTile * head_dim);
        weights = take(rows * kTile), seg_out = take(rows * head_dim), out = take(rows * head_dim);
        seg_max = take(rows), seg_sum = take(rows), max = take(rows), sum = take(rows);
        begin = reinterpret_cast<int64_t*>(p), end = begin + rows;  // 8-byte aligned: head_dim is a multiple of 16
    }
};

MINIVLLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
MINIVLLM_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

MINIVLLM_INLINE void scale_row(float* row, float factor, int64_t n) {
    for (int64_t d = 0; d < n; d += kLanes) store(row + d, load(row + d) * set1(factor));
}

// e^x by the vector kernel, so that one number and sixteen agree.
MINIVLLM_INLINE float exp_one(float x) {
    float lanes[kLanes];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// keys[d][j] = k[j][d]
template <class T>
void load_keys(float* keys, const T* k, int64_t head_dim) {
    for (int j = 0; j < kTile; j += kLanes)
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            Vec block[kLanes];
            for (int i = 0; i < kLanes; ++i) block[i] = load(k + (j + i) * head_dim + d);
            transpose(block);
            for (int i = 0; i < kLanes; ++i) store(keys + (d + i) * kTile + j, block[i]);
        }
}

// The same for bf16, two neighbours of a row travelling as one 32-bit lane: half the shuffles.
inline void load_keys(float* keys, const bf16* k, int64_t head_dim) {
    for (int j = 0; j < kTile; j += kLanes)
        for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
            const int pairs = int(lesser(kLanes, (head_dim - d) / 2));
            Vec block[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const void* row = k + (j + i) * head_dim + d;
                block[i] = pairs == kLanes ? load(static_cast<const float*>(row))
                                           : load_partial(static_cast<const float*>(row), pairs);
            }
            transpose(block);
            for (int i = 0; i < pairs; ++i) {
                float* to = keys + (d + 2 * i) * kTile + j;
                store(to, floats_of(shift_left<16>(bits_of(block[i]))));
                store(to + kTile, floats_of(shift_left<16>(shift_right<16>(bits_of(block[i])))));
            }
        }
}

// The first n values of a tile as float32: in the cache itself where they already are.
MINIVLLM_INLINE const float* load_values(float*, const float* v, int64_t) { return v; }
template <class T>
const float* load_values(float* values, const T* v, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store(values + i, load(v + i));
    return values;
}

template <int R>
MINIVLLM_INLINE void score_block(float* scores, const float* q, const float* keys, int64_t head_dim) {
    Vec acc[R][kTileVecs];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVecs; ++c) acc[r][c] = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        Vec key[kTileVecs];
        for (int c = 0; c < kTileVecs; ++c) key[c] = load(keys + d * kTile + c * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec x = set1(q[r * head_dim + d]);
            for (int c = 0; c < kTileVecs; ++c) acc[r][c] = fma(x, key[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kTileVecs; ++c) store(scores + r * kTile + c * kLanes, acc[r][c]);
}

// scores[row][j] = q[row] · k[j]
template <int R = kScoreRows>
void score_rows(float* scores, const float* q, const float* keys, int64_t rows, int64_t head_dim) {
    for (; rows >= R; rows -= R, scores += R * kTile, q += R * head_dim) score_block<R>(scores, q, keys, head_dim);
    if constexpr (R > 1) score_rows<R / 2>(scores, q, keys, rows, head_dim);
}

template <int R, int C>
MINIVLLM_INLINE void output_block(float* out, const float* weights, const float* values, int64_t head_dim, int j,
                                  int j_end) {
    Vec acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * head_dim + c * kLanes);
    for (; j < j_end; ++j) {
        Vec value[C];
        for (int c = 0; c < C; ++c) value[c] = load(values + j * head_dim + c * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec w = set1(weights[r * kTile + j]);
            for (int c = 0; c < C; ++c) acc[r][c] = fma(w, value[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * head_dim + c * kLanes, acc[r][c]);
}

// out[row][d] += weights[row][j] * v[j][d] for j in [j, j_end), ascending, for R rows.
template <int R, int C = kOutputVecs>
void add_values(float* out, const float* weights, const float* values, int64_t head_dim, int j, int j_end,
                int64_t d = 0) {
    if (j >= j_end) return;
    for (; d + C * kLanes <= head_dim; d += C * kLanes)
        output_block<R, C>(out + d, weights, values + d, head_dim, j, j_end);
    if constexpr (C > 1) add_values<R, C / 2>(out, weights, values, head_dim, j, j_end, d);
}

// One task's walk over its request's keys and values.
template <class T>
class Tile {
public:
    Tile(const Attention& a, const Task& task, int64_t kv_head)
        : a_(a),
          group_(a.num_heads / a.num_kv_heads),
          rows_(task.num_queries * group_),
          head_dim_(a.head_dim),
          first_head_(kv_head * group_),
          first_token_(a.query_start_loc[task.request] + task.first_query),
          blocks_(a.block_table + task.request * a.block_table_stride),
          kv_head_(kv_head),
          w_(thread_scratch(1, Workspace::bytes(rows_, head_dim_)), rows_, head_dim_) {
        const int64_t q_len = a.query_start_loc[task.request + 1] - a.query_start_loc[task.request];
        const int64_t first_position = a.seq_lens[task.request] - q_len + task.first_query;
        for (int64_t r = 0; r < rows_; ++r) {
            w_.end[r] = first_position + r / group_ + 1;
            w_.begin[r] = greater(0, w_.end[r] - a.sliding_window);
        }
    }

    void run() {
        load_queries();
        const int64_t end = w_.end[rows_ - 1];
        for (int64_t segment = w_.begin[0] / kSegment * kSegment; segment < end; segment += kSegment) {
            const int64_t segment_end = lesser(segment + kSegment, end);
            start_segment();
            for (int64_t p = greater(segment, w_.begin[0] / kTile * kTile); p < segment_end; p += kTile) add_tile(p);
            merge_segment(segment, segment + kSegment);
        }
        store_output();
    }

private:
    void load_queries() {
        const T* q = static_cast<const T*>(a_.q) + first_token_ * a_.q_token_stride + first_head_ * a_.q_head_stride;
        for (int64_t r = 0; r < rows_; ++r) {
            const T* row = q + r / group_ * a_.q_token_stride + r % group_ * a_.q_head_stride;
            for (int64_t d = 0; d < head_dim_; d += kLanes) store(w_.q + r * head_dim_ + d, load(row + d));
        }
    }

    void start_segment() {
        for (int64_t i = 0; i < rows_ * head_dim_; i += kLanes) store(w_.seg_out + i, zero());
        for (int64_t r = 0; r < rows_; ++r) w_.seg_max[r] = -kInfinity, w_.seg_sum[r] = 0;
    }

    // The positions [p, p + 32), which lie in one block because its size is a multiple of 32.
    void add_tile(int64_t p) {
        const int64_t half_block = a_.num_kv_heads * a_.block_size * head_dim_;
        const T* block = static_cast<const T*>(a_.kv_cache) + blocks_[p / a_.block_size] * 2 * half_block;
        const T* k = block + (kv_head_ * a_.block_size + p % a_.block_size) * head_dim_;
        const int64_t first = first_row_that_sees(p), last = last_row_that_sees(p) + 1;
        if (first >= last) return;
        const int64_t used = lesser(kTile, w_.end[last - 1] - p);
        load_keys(w_.keys, k, head_dim_);
        const float* values = load_values(w_.values, k + half_block, used * head_dim_);
        score_rows(w_.weights + first * kTile, w_.q + first * head_dim_, w_.keys, last - first, head_dim_);
        for (int64_t r = first; r < last; ++r) weigh_row(r, visible_from(r, p), visible_to(r, p));
        add_rows(first, last, p, values);
    }

    // Rows ascend in position, so those that see a tile are neighbours.
    int64_t first_row_that_sees(int64_t p) const {
        int64_t r = 0;
        while (r < rows_ && w_.end[r] <= p) ++r;
        return r;
    }
    int64_t last_row_that_sees(int64_t p) const {
        int64_t r = rows_ - 1;
        while (r >= 0 && w_.begin[r] >= p + kTile) --r;
        return r;
    }
    int visible_from(int64_t r, int64_t p) const { return int(greater(w_.begin[r] - p, 0)); }
    int visible_to(int64_t r, int64_t p) const { return int(lesser(w_.end[r] - p, kTile)); }

    // Scores to softmax numerators; the row's max, sum and output move to the new maximum.
    void weigh_row(int64_t r, int from, int to) {
        float* weights = w_.weights + r * kTile;
        Vec s[kTileVecs];
        Vec largest = set1(-kInfinity);
        for (int c = 0; c < kTileVecs; ++c) {
            const Vec j = lane_numbers() + set1(float(c * kLanes));
            const Vec score = load(weights + c * kLanes) * set1(a_.scale);
            const Vec seen = where_less(j, set1(float(to)), score, set1(-kInfinity));
            s[c] = where_less(j, set1(float(from)), set1(-kInfinity), seen);
            largest = max(largest, s[c]);
        }
        const float tile_max = reduce_max(largest);
        const float new_max = tile_max > w_.seg_max[r] ? tile_max : w_.seg_max[r];
        Vec total = zero();
        for (int c = 0; c < kTileVecs; ++c) {
            const Vec weight = exp(s[c] - set1(new_max));
            store(weights + c * kLanes, weight);
            total = total + weight;
        }
        const float kept = w_.seg_max[r] == new_max ? 1.0f : exp_one(w_.seg_max[r] - new_max);
        w_.seg_sum[r] = w_.seg_sum[r] * kept + reduce_add(total);
        w_.seg_max[r] = new_max;
        if (kept != 1.0f) scale_row(w_.seg_out + r * head_dim_, kept, head_dim_);
    }

    template <int R = kOutputRows>
    void add_rows(int64_t r, int64_t last, int64_t p, const float* values) {
        for (; r + R <= last; r += R) add_neighbours<R>(r, p, values);
        if constexpr (R > 1) add_rows<R / 2>(r, last, p, values);
    }

    // R rows together where all of them see the positions, each alone before and after; ascending for each.
    template <int R>
    void add_neighbours(int64_t r, int64_t p, const float* values) {
        float* out = w_.seg_out + r * head_dim_;
        const float* weights = w_.weights + r * kTile;
        const int all_from = visible_from(r + R - 1, p), all_to = visible_to(r, p);
        const bool together = all_from < all_to;
        for (int i = 0; i < R; ++i)
            add_values<1>(out + i * head_dim_, weights + i * kTile, values, head_dim_, visible_from(r + i, p),
                          together ? all_from : visible_to(r + i, p));
        if (!together) return;
        add_values<R>(out, weights, values, head_dim_, all_from, all_to);
        for (int i = 0; i < R; ++i)
            add_values<1>(out + i * head_dim_, weights + i * kTile, values, head_dim_, all_to, visible_to(r + i, p));
    }

    void merge_segment(int64_t begin, int64_t end) {
        for (int64_t r = 0; r < rows_; ++r) {
            if (w_.begin[r] >= end || w_.end[r] <= begin) continue;
            if (w_.begin[r] >= begin) copy_segment(r);
            else merge_row(r);
        }
    }

    void copy_segment(int64_t r) {
        w_.max[r] = w_.seg_max[r];
        w_.sum[r] = w_.seg_sum[r];
        std::memcpy(w_.out + r * head_dim_, w_.seg_out + r * head_dim_, size_t(head_dim_ * 4));
    }

    void merge_row(int64_t r) {
        const float larger = w_.seg_max[r] > w_.max[r] ? w_.seg_max[r] : w_.max[r];
        const float ours = exp_one(w_.max[r] - larger), theirs = exp_one(w_.seg_max[r] - larger);
        w_.sum[r] = w_.sum[r] * ours + w_.seg_sum[r] * theirs;
        w_.max[r] = larger;
        float *out = w_.out + r * head_dim_, *seg = w_.seg_out + r * head_dim_;
        for (int64_t d = 0; d < head_dim_; d += kLanes)
            store(out + d, fma(load(seg + d), set1(theirs), load(out + d) * set1(ours)));
    }

    void store_output() {
        T* out = static_cast<T*>(a_.out) + first_token_ * a_.num_heads * head_dim_ + first_head_ * head_dim_;
        for (int64_t r = 0; r < rows_; ++r) {
            T* row = out + r / group_ * a_.num_heads * head_dim_ + r % group_ * head_dim_;
            for (int64_t d = 0; d < head_dim_; d += kLanes)
                store(row + d, load(w_.out + r * head_dim_ + d) / set1(w_.sum[r]));
        }
    }

    const Attention& a_;
    const int64_t group_, rows_, head_dim_, first_head_, first_token_;
    const int32_t* blocks_;
    const int64_t kv_head_;
    Workspace w_;
};

// Every request's query tiles, the last first: later rows see more, and the longest tasks should start first.
int64_t list_tasks(const Attention& a, Task*& tasks) {
    const int64_t queries = greater(1, kMaxRows / (a.num_heads / a.num_kv_heads));
    int64_t num_tasks = 0;
    for (int64_t b = 0; b < a.num_reqs; ++b)
        num_tasks += (a.query_start_loc[b + 1] - a.query_start_loc[b] + queries - 1) / queries;
    tasks = static_cast<Task*>(thread_scratch(0, size_t(num_tasks) * sizeof(Task)));
    int64_t i = 0;
    for (int64_t b = 0; b < a.num_reqs; ++b) {
        const int64_t q_len = a.query_start_loc[b + 1] - a.query_start_loc[b];
        for (int64_t q = (q_len - 1) / queries * queries; q_len > 0 && q >= 0; q -= queries)
            tasks[i++] = {int32_t(b), int32_t(q), int32_t(lesser(queries, q_len - q))};
    }
    return num_tasks;
}

void run(const Attention& a) {
    Task* tasks;
    const int64_t num_tasks = list_tasks(a, tasks);
    parallel_tasks(num_tasks * a.num_kv_heads, [&](int64_t i) {
        const Task& task = tasks[i / a.num_kv_heads];
        const int64_t kv_head = i % a.num_kv_heads;
        with_dtype(a.dtype, [&](auto type) { Tile<typename decltype(type)::type>(a, task, kv_head).run(); });
    });
}

}  // namespace

const AttentionKernels attention_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
