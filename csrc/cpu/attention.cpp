// Paged attention: which rows walk together over which keys and values, and on which thread. What a row's result is
// does not depend on it.
#include "attention.h"

#include "attention_fma.h"
#include "attention_walk.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

// Query rows of one request, or of the members of a group over what they share, against some of the KV heads.
struct Unit {
    int32_t request;                   // whose row of the block table is followed
    int32_t first_query, num_queries;  // from the request's first
    int32_t member;                    // where the request stands among all members of groups, or -1
    int32_t first_member, num_members; // of a shared unit: whose rows
    int32_t first_head, num_heads;     // KV heads
    int64_t begin, end;                // positions
};

struct Work {
    Unit *shared, *own;
    int64_t num_shared = 0, num_own = 0;
    float* carried;  // [num_members, num_heads, carried_floats]
};

int64_t group_size(const Attention& a) { return a.num_heads / a.layout.num_kv_heads; }
int64_t rows_together(const Attention& a) { return greater(1, kMaxRows / group_size(a)); }

// What the members of each group share, as many of them together as a walk has rows.
void list_shared(const Attention& a, Work& work) {
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int64_t m = a.group_starts[g]; m < a.group_starts[g + 1]; m += rows_together(a))
            for (int32_t h = 0; h < a.layout.num_kv_heads; ++h) {
                const int64_t n = lesser(rows_together(a), a.group_starts[g + 1] - m);
                work.shared[work.num_shared++] = {a.members[m], 0, 0, -1, int32_t(m), int32_t(n), h, 1, 0, a.shared_lens[g]};
            }
}

void list_own(const Attention& a, int32_t request, int32_t member, int64_t begin, int64_t heads_together, Work& work) {
    const int64_t heads = a.layout.num_kv_heads, queries = rows_together(a);
    const int64_t q_len = a.query_start_loc[request + 1] - a.query_start_loc[request];
    const int64_t first_position = a.seq_lens[request] - q_len;
    if (q_len > 1) heads_together = 1;
    // Later rows see more: the longest walks start first.
    for (int64_t q = (q_len - 1) / queries * queries; q_len > 0 && q >= 0; q -= queries) {
        const int64_t n = lesser(queries, q_len - q);
        for (int64_t h = 0; h < heads; h += heads_together)
            work.own[work.num_own++] = {request, int32_t(q), int32_t(n), member, 0, 0, int32_t(h),
                                        int32_t(lesser(heads_together, heads - h)), begin, first_position + q + n};
    }
}

Work list_work(const Attention& a) {
    const int64_t heads = a.layout.num_kv_heads;
    int64_t num_shared = a.num_groups * heads, num_own = 0, num_decodes = 0;
    for (int64_t b = 0; b < a.num_reqs; ++b) {
        const int64_t q_len = a.query_start_loc[b + 1] - a.query_start_loc[b];
        num_own += (q_len + rows_together(a) - 1) / rows_together(a) * heads;
        num_decodes += q_len == 1;
    }
    num_shared += a.num_members / rows_together(a) * heads;
    const int64_t carried = a.num_members * a.num_heads * carried_floats(a.layout.head_dim) * 4;
    char* memory = static_cast<char*>(
        thread_scratch(0, size_t(carried + (num_shared + num_own) * int64_t(sizeof(Unit)) + a.num_reqs * 8)));
    Work work{};
    work.carried = reinterpret_cast<float*>(memory);
    work.shared = reinterpret_cast<Unit*>(memory + carried);
    work.own = work.shared + num_shared;
    int32_t* member = reinterpret_cast<int32_t*>(work.own + num_own);  // [num_reqs], then where its own part begins
    int32_t* begin = member + a.num_reqs;
    for (int64_t b = 0; b < a.num_reqs; ++b) member[b] = -1, begin[b] = 0;
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int32_t m = a.group_starts[g]; m < a.group_starts[g + 1]; ++m)
            member[a.members[m]] = m, begin[a.members[m]] = a.shared_lens[g];
    list_shared(a, work);
    // A walk fetches the next head's first keys while it ends: many heads together, if that leaves enough to share out.
    const int64_t heads_together = greater(1, lesser(heads, num_decodes * heads / (16 * num_threads())));
    for (const bool is_decode : {false, true})  // prompts first: their walks are the longest
        for (int64_t b = 0; b < a.num_reqs; ++b)
            if ((a.query_start_loc[b + 1] - a.query_start_loc[b] == 1) == is_decode)
                list_own(a, int32_t(b), member[b], begin[b], heads_together, work);
    return work;
}

float* carried_of(const Attention& a, const Work& work, int64_t member, int64_t head) {
    return work.carried + (member * a.num_heads + head) * carried_floats(a.layout.head_dim);
}

void own_rows(const Attention& a, const Work& work, const Unit& unit, int64_t kv_head, Rows& rows) {
    const int64_t group = group_size(a);
    rows.count = unit.num_queries * group;
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t query = unit.first_query + r / group;
        rows.head[r] = int32_t(kv_head * group + r % group);
        rows.token[r] = int32_t(a.query_start_loc[unit.request] + query);
        rows.position[r] = a.seq_lens[unit.request] - (a.query_start_loc[unit.request + 1] - rows.token[r]);
        rows.end[r] = rows.position[r] + 1;
        rows.begin[r] = greater(0, rows.end[r] - a.sliding_window);
        rows.carried[r] = unit.member < 0 ? nullptr : carried_of(a, work, unit.member, rows.head[r]);
    }
}

void shared_rows(const Attention& a, const Work& work, const Unit& unit, int64_t kv_head, Rows& rows) {
    const int64_t group = group_size(a);
    rows.count = unit.num_members * group;
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t member = unit.first_member + r / group, request = a.members[member];
        rows.head[r] = int32_t(kv_head * group + r % group);
        rows.token[r] = a.query_start_loc[request];
        rows.position[r] = a.seq_lens[request] - 1;
        rows.end[r] = unit.end;
        rows.begin[r] = 0;
        rows.carried[r] = carried_of(a, work, member, rows.head[r]);
    }
}

template <class Math>
void run_unit(const Attention& a, const Work& work, const Unit& unit) {
    const bool is_shared = unit.num_members > 0;
    Rows rows;
    for (int64_t h = unit.first_head; h < unit.first_head + unit.num_heads; ++h) {
        if (is_shared) shared_rows(a, work, unit, h, rows);
        else own_rows(a, work, unit, h, rows);
        const int32_t* blocks = a.block_table + unit.request * a.block_table_stride;
        const Path path{blocks, h, unit.begin, unit.end, unit.member >= 0, is_shared};
        Path next = path;
        next.kv_head = h + 1;
        next.begin = greater(next.begin, rows.begin[0] / kStep * kStep);
        Walk<Math>(a, rows).run(path, h + 1 < unit.first_head + unit.num_heads ? &next : nullptr);
    }
}

template <class Math>
void run_with(const Attention& a) {
    const Work work = list_work(a);
    parallel_tasks(work.num_shared, [&](int64_t i) { run_unit<Math>(a, work, work.shared[i]); });
    parallel_tasks(work.num_own, [&](int64_t i) { run_unit<Math>(a, work, work.own[i]); });
}

void run(const Attention& a) {
#if defined(__AMX_BF16__)
    const KvType type = a.layout.type;
    if (a.dtype == DType::bf16 && type != KvType::f32 && type != KvType::f16) return run_with<AmxMath>(a);
#endif
    run_with<FmaMath>(a);
}

}  // namespace

const AttentionKernels attention_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
