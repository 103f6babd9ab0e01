// Paged attention: which rows walk together over which keys and values, and on which thread. What a row's result is
// does not depend on it.
#include "attention.h"

#include "attention_fma.h"
#include "attention_walk.h"
#if defined(__AMX_BF16__)
#include "attention_amx_wide.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

// Query rows of one request, or of the members of a group over what they share, against some of the KV heads.
struct Unit {
    int32_t request;                    // whose row of the block table is followed
    int32_t first_query, num_queries;   // from the request's first
    int32_t first_member, num_members;  // of a shared walk: whose rows
    int32_t first_head, num_heads;      // KV heads
    int32_t state;                      // where the rows' states lie between walks: a row of Work.states, or -1
    int32_t num_parts;                  // of a join
    Ending ending;
    bool resumes;
    int64_t begin, end;  // positions
};

// Three rounds: what groups share; each request's own keys, long ones in parts if threads would idle; their joining.
struct Work {
    Unit *shared, *own, *joins;
    int64_t num_shared = 0, num_own = 0, num_joins = 0;
    float* states;          // [members of groups, then parts][num_heads][carried_floats]
    int64_t positions;      // whose rows walk together, the heads of the group each
    int64_t next_state;     // the first row of states that nobody has
};

int64_t group_size(const Attention& a) { return a.num_heads / a.layout.num_kv_heads; }
int64_t num_parts(int64_t begin, int64_t end) { return (end + kSegment - 1) / kSegment - begin / kSegment; }

// Many rows read keys and values seldom, few rows give every thread enough walks to balance.
int64_t positions_together(const Attention& a) {
    const int64_t num_rows = (a.query_start_loc[a.num_reqs] - a.query_start_loc[0]) * a.num_heads;
    int64_t rows = kMaxRows;
    while (rows > 64 && num_rows / rows < 8 * num_threads()) rows /= 2;
    return greater(1, rows / group_size(a));
}

// What the members of each group share, as many of them together as a walk has rows.
void list_shared(const Attention& a, Work& work) {
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int64_t m = a.group_starts[g]; m < a.group_starts[g + 1]; m += work.positions)
            for (int32_t h = 0; h < a.layout.num_kv_heads; ++h) {
                const int64_t n = lesser(work.positions, a.group_starts[g + 1] - m);
                work.shared[work.num_shared++] = {a.members[m], 0, 0, int32_t(m), int32_t(n), h, 1, int32_t(m), 0,
                                                  Ending::shared, false, 0, a.shared_lens[g]};
            }
}

void list_prompt(const Attention& a, int32_t request, Work& work) {
    const int64_t q_len = a.query_start_loc[request + 1] - a.query_start_loc[request];
    const int64_t first_position = a.seq_lens[request] - q_len;
    // A head's keys and values stay in the second cache while its rows pass. Later rows see more: the longest walks of
    // a head start first, so that short ones come last.
    for (int32_t h = 0; h < a.layout.num_kv_heads; ++h)
        for (int64_t q = (q_len - 1) / work.positions * work.positions; q_len > 0 && q >= 0; q -= work.positions) {
            const int64_t n = lesser(work.positions, q_len - q);
            work.own[work.num_own++] = {request, int32_t(q), int32_t(n), 0, 0, h, 1, -1, 0, Ending::output, false, 0,
                                        first_position + q + n};
        }
}

void list_decode(const Attention& a, int32_t request, int32_t member, int64_t begin, int64_t heads_together,
                 bool in_parts, Work& work) {
    const int64_t heads = a.layout.num_kv_heads, end = a.seq_lens[request], parts = num_parts(begin, end);
    Unit unit{request, 0, 1, 0, 0, 0, 0, member, 0, Ending::output, member >= 0, begin, end};
    in_parts = in_parts && member < 0 && parts > 1;
    const int64_t first_state = work.next_state;
    for (int64_t h = 0; h < heads; h += heads_together) {
        unit.first_head = int32_t(h);
        unit.num_heads = int32_t(lesser(heads_together, heads - h));
        for (int64_t part = 0; part < (in_parts ? parts : 1); ++part) {
            if (in_parts) {
                unit.state = int32_t(first_state + part);
                unit.ending = Ending::part;
                unit.begin = part * kSegment;
                unit.end = lesser(unit.begin + kSegment, end);
            }
            work.own[work.num_own++] = unit;
        }
        if (in_parts) {
            unit.state = int32_t(first_state);
            unit.num_parts = int32_t(parts);
            work.joins[work.num_joins++] = unit;
            unit.num_parts = 0;
        }
    }
    if (in_parts) work.next_state += parts;
}

Work list_work(const Attention& a) {
    const int64_t heads = a.layout.num_kv_heads;
    Work work{};
    work.positions = positions_together(a);
    int64_t num_decodes = 0, num_own = 0, most_parts = 0;
    for (int64_t b = 0; b < a.num_reqs; ++b) {
        const int64_t q_len = a.query_start_loc[b + 1] - a.query_start_loc[b];
        num_own += (q_len + work.positions - 1) / work.positions * heads;
        num_decodes += q_len == 1;
        most_parts += q_len == 1 ? num_parts(0, a.seq_lens[b]) : 0;
    }
    const bool in_parts = num_own < 4 * num_threads() && a.sliding_window == kNoWindow;
    if (in_parts) num_own += most_parts * heads;
    const int64_t num_states = a.num_members + (in_parts ? most_parts : 0);
    const int64_t num_shared = (a.num_groups + a.num_members / work.positions) * heads;
    const int64_t num_joins = in_parts ? num_decodes * heads : 0;
    const int64_t state_bytes = num_states * a.num_heads * carried_floats(a.layout.head_dim) * 4;
    char* memory = static_cast<char*>(thread_scratch(
        0, size_t(state_bytes + (num_shared + num_own + num_joins) * int64_t(sizeof(Unit)) + a.num_reqs * 8)));
    work.states = reinterpret_cast<float*>(memory);
    work.next_state = a.num_members;
    work.shared = reinterpret_cast<Unit*>(memory + state_bytes);
    work.own = work.shared + num_shared;
    work.joins = work.own + num_own;
    int32_t* member = reinterpret_cast<int32_t*>(work.joins + num_joins);  // [num_reqs], then where its own part begins
    int32_t* begin = member + a.num_reqs;
    for (int64_t b = 0; b < a.num_reqs; ++b) member[b] = -1, begin[b] = 0;
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int32_t m = a.group_starts[g]; m < a.group_starts[g + 1]; ++m)
            member[a.members[m]] = m, begin[a.members[m]] = a.shared_lens[g];
    list_shared(a, work);
    const auto is_decode = [&a](int64_t b) { return a.query_start_loc[b + 1] - a.query_start_loc[b] == 1; };
    for (int64_t b = 0; b < a.num_reqs; ++b)  // prompts first: their walks are the longest
        if (!is_decode(b)) list_prompt(a, int32_t(b), work);
    // A walk fetches the next head's first keys while it ends: many heads together, if that leaves enough to share out.
    const int64_t heads_together = greater(1, lesser(heads, num_decodes * heads / (16 * num_threads())));
    for (int64_t b = 0; b < a.num_reqs; ++b)
        if (is_decode(b)) list_decode(a, int32_t(b), member[b], begin[b], heads_together, in_parts, work);
    return work;
}

float* state_of(const Attention& a, const Work& work, int64_t state, int64_t head) {
    return state < 0 ? nullptr : work.states + (state * a.num_heads + head) * carried_floats(a.layout.head_dim);
}

void own_rows(const Attention& a, const Work& work, const Unit& unit, int64_t kv_head, Rows& rows) {
    const int64_t group = group_size(a), first_head = kv_head * group;
    const int64_t first_token = a.query_start_loc[unit.request] + unit.first_query;
    const int64_t first_position = a.seq_lens[unit.request] - (a.query_start_loc[unit.request + 1] - first_token);
    rows.count = unit.num_queries * group;
    for (int64_t i = 0, r = 0; i < unit.num_queries; ++i)
        for (int64_t g = 0; g < group; ++g, ++r) {
            rows.head[r] = int32_t(first_head + g);
            rows.token[r] = int32_t(first_token + i);
            rows.position[r] = first_position + i;
            rows.begin[r] = greater(0, rows.position[r] + 1 - a.sliding_window);
            rows.end[r] = rows.position[r] + 1;
            rows.carried[r] = state_of(a, work, unit.state, rows.head[r]);
            if (unit.ending == Ending::part) rows.begin[r] = unit.begin, rows.end[r] = unit.end;
        }
}

void shared_rows(const Attention& a, const Work& work, const Unit& unit, int64_t kv_head, Rows& rows) {
    const int64_t group = group_size(a), first_head = kv_head * group;
    rows.count = unit.num_members * group;
    for (int64_t m = unit.first_member, r = 0; m < unit.first_member + unit.num_members; ++m)
        for (int64_t g = 0; g < group; ++g, ++r) {
            const int64_t request = a.members[m];
            rows.head[r] = int32_t(first_head + g);
            rows.token[r] = a.query_start_loc[request];
            rows.position[r] = a.seq_lens[request] - 1;
            rows.begin[r] = 0;
            rows.end[r] = unit.end;
            rows.carried[r] = state_of(a, work, m, rows.head[r]);
        }
}

template <class Math>
void run_unit(const Attention& a, const Work& work, const Unit& unit) {
    Rows rows;
    const int32_t* blocks = a.block_table + unit.request * a.block_table_stride;
    for (int64_t h = unit.first_head; h < unit.first_head + unit.num_heads; ++h) {
        if (unit.num_members > 0) shared_rows(a, work, unit, h, rows);
        else own_rows(a, work, unit, h, rows);
#if defined(__AMX_BF16__)
        if (std::is_same_v<Math, AmxMath> && rows.count > AmxMath::kBlock && !unit.resumes &&
            unit.ending != Ending::part && unit.num_parts == 0) {
            WideWalk(a, rows).run({blocks, h, unit.begin, unit.end, false, unit.ending});
            continue;
        }
#endif
        Walk<Math> walk(a, rows);
        if (unit.num_parts > 0) {
            walk.join(unit.num_parts, a.num_heads * carried_floats(a.layout.head_dim));
            continue;
        }
        const Path path{blocks, h, unit.begin, unit.end, unit.resumes, unit.ending};
        Path next = path;
        next.kv_head = h + 1;
        next.begin = greater(next.begin, rows.begin[0] / kStep * kStep);
        walk.run(path, h + 1 < unit.first_head + unit.num_heads ? &next : nullptr);
    }
}

template <class Math>
void run_with(const Attention& a) {
    const Work work = list_work(a);
    parallel_tasks(work.num_shared, [&](int64_t i) { run_unit<Math>(a, work, work.shared[i]); });
    parallel_tasks(work.num_own, [&](int64_t i) { run_unit<Math>(a, work, work.own[i]); });
    parallel_tasks(work.num_joins, [&](int64_t i) { run_unit<Math>(a, work, work.joins[i]); });
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
