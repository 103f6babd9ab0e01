// Launches the truncation of rows of logits.
#include "truncation.h"

#include "check.h"
#include "kernels.h"

namespace minivllm::cuda {

static_assert(sizeof(TruncationShared) <= 48 << 10, "what a thread block has without asking for more");

void truncate(const Truncation& t, int num_rows, cudaStream_t stream) {
    if (num_rows == 0) return;
    if (t.vocab_size > kMostTokens)
        throw std::invalid_argument("truncate: " + std::to_string(t.vocab_size) + " logits a row; the kernel takes " +
                                    std::to_string(kMostTokens));
    truncate_rows<kTruncationThreads, 1><<<num_rows, kTruncationThreads, sizeof(TruncationShared), stream>>>(t);
    check(cudaGetLastError(), "truncate");
}

}  // namespace minivllm::cuda
