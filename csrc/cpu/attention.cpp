// Paged attention: which rows walk together over which keys and values, and on which thread. What a row's result is
// does not depend on it.
#include "attention.h"

#include <atomic>
#include <new>

#include "attention_fma.h"
#include "attention_walk.h"
#if defined(__AMX_BF16__)
#include "attention_amx_wide.h"
#endif

namespace minivllm::MINIVLLM_ISA {
namespace {

#if !defined(__AMX_BF16__)
struct WidenedTiles {};
#endif

// Query rows of one request, or of the members of a group over what they share, against one KV head; or a request's one
// row against several.
struct Unit {
    int32_t request;                    // whose row of the block table is followed
    int32_t first_query, num_queries;   // from the request's first
    int32_t first_member, num_members;  // of a shared walk: whose rows
    int32_t kv_head, num_kv_heads;
    int32_t state;                      // where the rows' states lie between walks: a row of Work.states, or -1
    int32_t num_parts;                  // of a join
    Ending ending;
    bool resumes;
    int64_t begin, end;  // positions
    bool writes;         // the last position's keys and values
};

// A thread's units, [first, end): it takes them in order, as each walk fetches what the next begins with; threads that
// have done theirs take the last of others.
struct alignas(64) Share {
    std::atomic<uint64_t> range;  // first, and in the upper half end

    void set(int64_t first, int64_t end) { range.store(uint64_t(end) << 32 | uint64_t(first)); }

    // The one taken, and of what is left the one that the same thread would take next; -1: none.
    struct Taken { int64_t unit, next; };
    Taken take(bool is_own) {
        for (uint64_t seen = range.load(std::memory_order_relaxed);;) {
            const int64_t first = uint32_t(seen), end = int64_t(seen >> 32);
            if (first >= end) return {-1, -1};
            const uint64_t left = is_own ? seen + 1 : seen - (uint64_t(1) << 32);
            if (!range.compare_exchange_weak(seen, left, std::memory_order_relaxed)) continue;
            const bool is_last = first + 1 == end;
            return is_own ? Taken{first, is_last ? -1 : first + 1} : Taken{end - 1, is_last ? -1 : end - 2};
        }
    }
};

struct Units {
    Unit* list = nullptr;
    int64_t num = 0;
    Share* shares = nullptr;  // [num_shares], or null

    void add(const Unit& unit) { list[num++] = unit; }
};

// Three rounds: what groups share; each request's own keys, long ones in parts if threads would idle; their joining.
struct Work {
    Units shared, prompts, decodes, joins;
    int num_shares;
    float* states;          // [members of groups, then parts][num_heads][carried_floats]
    int64_t positions;      // whose rows walk together, the heads of the group each
    int64_t heads;          // KV heads whose rows walk together, of a request with one row
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

// As many heads walk together as Math likes, but that each thread keeps some walks to balance.
template <class Math>
int64_t heads_together(const Attention& a, int64_t num_decodes) {
    int64_t heads = lesser(a.layout.num_kv_heads, greater(1, lesser(kMostHeads, Math::most_heads(a))));
    while (heads > 1 && num_decodes * a.layout.num_kv_heads / heads < 2 * num_threads()) heads /= 2;
    return heads;
}

// What the members of each group share, as many of them together as a walk has rows: a head's walks one after another.
void list_shared(const Attention& a, Work& work) {
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int32_t h = 0; h < a.layout.num_kv_heads; ++h)
            for (int64_t m = a.group_starts[g]; m < a.group_starts[g + 1]; m += work.positions) {
                const int64_t n = lesser(work.positions, a.group_starts[g + 1] - m);
                work.shared.add({a.members[m], 0, 0, int32_t(m), int32_t(n), h, 1, int32_t(m), 0, Ending::shared, false, 0,
                                 a.shared_lens[g], false});
            }
}

void list_prompt(const Attention& a, int32_t request, Work& work) {
    const int64_t q_len = a.query_start_loc[request + 1] - a.query_start_loc[request];
    const int64_t first_position = a.seq_lens[request] - q_len;
    // A head's keys and values stay in the second cache of one thread, or two, while its rows pass. Later rows see more:
    // the longest walks of a head start first, so that short ones come last, for others to take.
    for (int32_t h = 0; h < a.layout.num_kv_heads; ++h)
        for (int64_t q = (q_len - 1) / work.positions * work.positions; q_len > 0 && q >= 0; q -= work.positions) {
            const int64_t n = lesser(work.positions, q_len - q);
            work.prompts.add({request, int32_t(q), int32_t(n), 0, 0, h, 1, -1, 0, Ending::output, false, 0,
                              first_position + q + n, false});
        }
}

// Keys and values that no walk writes are written at once. Whether one does: of a request with one row, whose key is its
// own and lies where the walk will read it.
bool leaves_to_walk(const Attention& a, int32_t request, int64_t begin, bool may_write) {
    if (a.write == nullptr) return false;
    const int64_t first = a.query_start_loc[request], last = a.query_start_loc[request + 1];
    const int64_t p = a.seq_lens[request] - 1, size = a.layout.block_size;
    if (may_write && last - first == 1 && begin <= p &&
        a.write->slots[first] == a.block_table[request * a.block_table_stride + p / size] * size + p % size)
        return true;
    kv_write_kernels.rows(*a.write, first, last);
    return false;
}

void list_decode(const Attention& a, int32_t request, int32_t member, int64_t begin, bool in_parts, bool writes,
                 Work& work) {
    const int64_t end = a.seq_lens[request], parts = num_parts(begin, end);
    begin = greater(begin, (end - a.sliding_window) / kTile * kTile);
    Unit unit{request, 0, 1, 0, 0, 0, 0, member, 0, Ending::output, member >= 0, begin, end, writes};
    in_parts = in_parts && member < 0 && parts > 1;
    const int64_t first_state = work.next_state;
    for (int64_t h = 0; h < a.layout.num_kv_heads; h += work.heads) {
        unit.kv_head = int32_t(h);
        unit.num_kv_heads = int32_t(lesser(work.heads, a.layout.num_kv_heads - h));
        for (int64_t part = 0; part < (in_parts ? parts : 1); ++part) {
            if (in_parts) {
                unit.state = int32_t(first_state + part);
                unit.ending = Ending::part;
                unit.begin = part * kSegment;
                unit.end = lesser(unit.begin + kSegment, end);
            }
            work.decodes.add(unit);
        }
        if (in_parts) {
            unit.state = int32_t(first_state);
            unit.num_parts = int32_t(parts);
            work.joins.add(unit);
            unit.num_parts = 0;
        }
    }
    if (in_parts) work.next_state += parts;
}

int64_t num_positions(const Unit& unit) { return (unit.end - unit.begin) * unit.num_kv_heads; }

// Shares of as many positions each.
void share_out(Units& units, int num_shares) {
    int64_t total = 0, walked = 0, i = 0;
    for (int64_t u = 0; u < units.num; ++u) total += num_positions(units.list[u]);
    for (int t = 0; t < num_shares; ++t) {
        const int64_t first = i;
        while (i < units.num && (walked < total * (t + 1) / num_shares || t + 1 == num_shares)) {
            walked += num_positions(units.list[i]);
            ++i;
        }
        (new (units.shares + t) Share)->set(first, i);
    }
}

template <class Math>
Work list_work(const Attention& a) {
    const int64_t heads = a.layout.num_kv_heads;
    Work work{};
    if (a.write != nullptr) {  // rows of no request
        kv_write_kernels.rows(*a.write, 0, a.query_start_loc[0]);
        kv_write_kernels.rows(*a.write, a.query_start_loc[a.num_reqs], a.write->num_tokens);
    }
    work.positions = positions_together(a);
    work.num_shares = num_threads();
    int64_t num_prompts = 0, num_decodes = 0, most_parts = 0;
    for (int64_t b = 0; b < a.num_reqs; ++b) {
        const int64_t q_len = a.query_start_loc[b + 1] - a.query_start_loc[b];
        if (q_len == 1) ++num_decodes, most_parts += num_parts(0, a.seq_lens[b]);
        else num_prompts += (q_len + work.positions - 1) / work.positions;
    }
    work.heads = heads_together<Math>(a, num_decodes);
    const bool in_parts = (num_prompts + num_decodes) * heads < 4 * num_threads() && a.sliding_window == kNoWindow;
    const int64_t num_states = a.num_members + (in_parts ? most_parts : 0);
    const int64_t num_shared = a.num_groups + a.num_members / work.positions;
    const int64_t num_units = num_shared + num_prompts + num_decodes + (in_parts ? num_decodes + most_parts : 0);
    const int64_t state_bytes = (num_states * a.num_heads * carried_floats(a.layout.head_dim) * 4 + 63) / 64 * 64;
    const int64_t share_bytes = 3 * work.num_shares * int64_t(sizeof(Share));
    char* memory = static_cast<char*>(thread_scratch(
        0, size_t(state_bytes + share_bytes + num_units * heads * int64_t(sizeof(Unit)) + a.num_reqs * 8)));
    work.states = reinterpret_cast<float*>(memory);
    work.next_state = a.num_members;
    work.shared.shares = reinterpret_cast<Share*>(memory + state_bytes);
    work.prompts.shares = work.shared.shares + work.num_shares;
    work.decodes.shares = work.prompts.shares + work.num_shares;
    Unit* units = reinterpret_cast<Unit*>(memory + state_bytes + share_bytes);
    work.shared.list = units;
    work.prompts.list = work.shared.list + num_shared * heads;
    work.decodes.list = work.prompts.list + num_prompts * heads;
    work.joins.list = work.decodes.list + (num_decodes + (in_parts ? most_parts : 0)) * heads;
    int32_t* member = reinterpret_cast<int32_t*>(units + num_units * heads);  // [num_reqs]
    int32_t* begin = member + a.num_reqs;  // [num_reqs], of its own part
    for (int64_t b = 0; b < a.num_reqs; ++b) member[b] = -1, begin[b] = 0;
    for (int64_t g = 0; g < a.num_groups; ++g)
        for (int32_t m = a.group_starts[g]; m < a.group_starts[g + 1]; ++m)
            member[a.members[m]] = m, begin[a.members[m]] = a.shared_lens[g];
    list_shared(a, work);
    for (int64_t b = 0; b < a.num_reqs; ++b) {
        const bool writes = leaves_to_walk(a, int32_t(b), begin[b], Math::may_write(a));
        if (a.query_start_loc[b + 1] - a.query_start_loc[b] != 1) list_prompt(a, int32_t(b), work);
        else list_decode(a, int32_t(b), member[b], begin[b], in_parts, writes, work);
    }
    share_out(work.shared, work.num_shares);
    share_out(work.prompts, work.num_shares);
    share_out(work.decodes, work.num_shares);
    return work;
}

float* state_of(const Attention& a, const Work& work, int64_t state, int64_t head) {
    return state < 0 ? nullptr : work.states + (state * a.num_heads + head) * carried_floats(a.layout.head_dim);
}

void own_rows(const Attention& a, const Work& work, const Unit& unit, Rows& rows) {
    const int64_t group = group_size(a) * unit.num_kv_heads, first_head = unit.kv_head * group_size(a);
    const int64_t first_token = a.query_start_loc[unit.request] + unit.first_query;
    const int64_t first_position = a.seq_lens[unit.request] - (a.query_start_loc[unit.request + 1] - first_token);
    rows.count = unit.num_queries * group;
    rows.per_head = rows.count / unit.num_kv_heads;
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
    if (unit.writes && unit.end == a.seq_lens[unit.request]) rows.write = a.write;
}

void shared_rows(const Attention& a, const Work& work, const Unit& unit, Rows& rows) {
    const int64_t group = group_size(a), first_head = unit.kv_head * group;
    rows.count = rows.per_head = unit.num_members * group;
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

Path path_of(const Attention& a, const Unit& unit) {
    return {a.block_table + unit.request * a.block_table_stride, unit.kv_head, unit.begin, unit.end, unit.resumes,
            unit.ending};
}

// next: what this thread will probably run next, or null. widened: this thread's.
template <class Math>
void run_unit(const Attention& a, const Work& work, const Unit& unit, const Unit* next,
              [[maybe_unused]] WidenedTiles& widened) {
    Rows rows;
    if (unit.num_members > 0) shared_rows(a, work, unit, rows);
    else own_rows(a, work, unit, rows);
    const Path path = path_of(a, unit), next_path = path_of(a, next == nullptr ? unit : *next);
    const Path* expected = next == nullptr ? nullptr : &next_path;
#if defined(__AMX_BF16__)
    constexpr bool is_amx = std::is_same_v<Math, AmxMath>;
    [[maybe_unused]] const std::conditional_t<is_amx, FlushSubnormals, int> flush{};  // whichever walk a row takes
    if (is_amx && rows.count > AmxMath::kBlock && !unit.resumes &&
        unit.ending != Ending::part && unit.num_parts == 0) {
        widened.begin(a, unit.request, unit.kv_head);
        return WideWalk(a, rows, widened).run(path, expected);
    }
#endif
    Walk<Math> walk(a, rows);
    if (unit.num_parts > 0) walk.join(unit.num_parts, a.num_heads * carried_floats(a.layout.head_dim));
    else walk.run(path, expected);
}

// A thread's units: its share in order, then the last ones of other shares.
template <class Math>
void run_shares(const Attention& a, const Work& work, const Units& units, int thread, WidenedTiles& widened) {
    for (int i = 0; i < work.num_shares; ++i) {
        Share& share = units.shares[(thread + i) % work.num_shares];
        for (Share::Taken t; (t = share.take(i == 0)).unit >= 0;)
            run_unit<Math>(a, work, units.list[t.unit], t.next < 0 ? nullptr : units.list + t.next, widened);
    }
}

template <class Math>
void run_with(const Attention& a) {
    const Work work = list_work<Math>(a);
    struct Context { const Attention& a; const Work& work; } context{a, work};
    run_on_threads(int(lesser(work.num_shares, work.shared.num)), [](void* p, int thread) {
        const Context& c = *static_cast<Context*>(p);
        WidenedTiles widened;
        run_shares<Math>(c.a, c.work, c.work.shared, thread, widened);
    }, &context);
    run_on_threads(int(lesser(work.num_shares, work.prompts.num + work.decodes.num)), [](void* p, int thread) {
        const Context& c = *static_cast<Context*>(p);
        WidenedTiles widened;
        run_shares<Math>(c.a, c.work, c.work.prompts, thread, widened);  // first, as their walks are the longest
        run_shares<Math>(c.a, c.work, c.work.decodes, thread, widened);
    }, &context);
    parallel_tasks(work.joins.num, [&](int64_t i) {
        WidenedTiles widened;
        run_unit<Math>(a, work, work.joins.list[i], nullptr, widened);
    });
}

void run(const Attention& a) {
#if defined(__AMX_BF16__)
    const KvType type = a.layout.type;
    if (a.dtype == DType::bf16 && type != KvType::f32 && type != KvType::f16) return run_with<AmxMath>(a);
#endif
    Attention rest = a;
    if (a.write != nullptr) kv_write_kernels.run(*a.write);
    rest.write = nullptr;
    run_with<FmaMath>(rest);
}

}  // namespace

const AttentionKernels attention_kernels = {&run};

}  // namespace minivllm::MINIVLLM_ISA
