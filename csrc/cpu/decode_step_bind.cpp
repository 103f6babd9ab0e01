// The bookkeeping of a decode step, one call each instead of a dozen of numpy's: see minivllm/ops/decode_step.py. Rows index
// the request table; all arrays are of the same step's requests, in batch order, unless they are the table's.
#include "../bindings.h"

namespace minivllm {

// Returns whether every request is where a step a token further finds it; if so, moves the inputs there.
static bool move_on(int64_t num_reqs, uintptr_t rows_at, uintptr_t computed_at, uintptr_t known_at, uintptr_t tokens_at,
                    int64_t max_len, uintptr_t begins_at, uintptr_t ends_at, uintptr_t positions_at,
                    uintptr_t seq_lens_at, uintptr_t slots_at, uintptr_t input_ids_at) {
    const auto* rows = ptr<const int64_t>(rows_at);
    const auto *computed = ptr<const int64_t>(computed_at), *known = ptr<const int64_t>(known_at);
    const auto* tokens = ptr<const int32_t>(tokens_at);
    auto *begins = ptr<int64_t>(begins_at), *ends = ptr<int64_t>(ends_at), *positions = ptr<int64_t>(positions_at);
    auto *slots = ptr<int64_t>(slots_at), *input_ids = ptr<int64_t>(input_ids_at);
    auto* seq_lens = ptr<int32_t>(seq_lens_at);
    for (int64_t i = 0; i < num_reqs; ++i)
        if (computed[rows[i]] != ends[i] || known[rows[i]] != ends[i] + 1) return false;
    for (int64_t i = 0; i < num_reqs; ++i) {
        begins[i] = positions[i] = ends[i];
        seq_lens[i] = int32_t(++ends[i]);
        input_ids[i] = tokens[rows[i] * max_len + begins[i]];
        ++slots[i];
    }
    return true;
}

// Returns whether every token is sound; if so, appends each to its row, where it fits.
static bool append_drawn(int64_t num_reqs, uintptr_t drawn_at, uintptr_t broken_at, uintptr_t rows_at,
                         uintptr_t known_at, uintptr_t tokens_at, int64_t max_len) {
    const auto *drawn = ptr<const int64_t>(drawn_at), *rows = ptr<const int64_t>(rows_at);
    const auto* broken = ptr<const uint8_t>(broken_at);
    auto* known = ptr<int64_t>(known_at);
    auto* tokens = ptr<int32_t>(tokens_at);
    for (int64_t i = 0; i < num_reqs; ++i)
        if (broken[i]) return false;
    for (int64_t i = 0; i < num_reqs; ++i) {
        int64_t& end = known[rows[i]];
        if (end < max_len) tokens[rows[i] * max_len + end++] = int32_t(drawn[i]);
    }
    return true;
}

MINIVLLM_BIND(decode_step, m) {
    m.def("move_on", &move_on);
    m.def("append_drawn", &append_drawn);
}

}  // namespace minivllm
