// Rows of a table, gathered as they are: bytes, which no instruction set changes. See minivllm/ops/embedding.py.
#include <cstring>

#include "../bindings.h"
#include "row_ids.h"
#include "thread_pool.h"

namespace minivllm {

// out: num_ids contiguous rows; weight: n contiguous rows of row_bytes.
static void embedding(uintptr_t out, uintptr_t weight, int64_t n, int64_t row_bytes, uintptr_t ids_at,
                      int64_t num_ids) {
    const auto* ids = ptr<const int64_t>(ids_at);
    check_rows(ids, num_ids, n);
    constexpr int64_t kBytesWorthAThread = 64 << 10;
    parallel_for(num_ids, 1 + kBytesWorthAThread / (row_bytes + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            std::memcpy(ptr<char>(out) + i * row_bytes, ptr<const char>(weight) + ids[i] * row_bytes, row_bytes);
    });
}

MINIVLLM_BIND(embedding, m) { def_op(m, "embedding", &embedding); }

}  // namespace minivllm
