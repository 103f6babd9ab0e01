// Launches the product of few rows.
#include "check.h"
#include "few_rows_launch.h"
#include "kernels.h"

namespace minivllm::cuda {

void few_rows(const FewRows& p, WeightType type, cudaStream_t stream) {
    const bool is_served = visit_few_rows_kernel(p, type, [&](auto kernel, int blocks, int threads, int shared_bytes) {
        cudaLaunchAttribute early = {};  // what the kernel waits for, it waits for by itself
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared_bytes, config.stream = stream;
        config.attrs = &early, config.numAttrs = 1;
        check(cudaLaunchKernelEx(&config, kernel, p), "few_rows");
    });
    if (!is_served)
        throw std::invalid_argument("few_rows: no kernel for " + std::to_string(p.num_rows) + " rows of " +
                                    std::to_string(p.row_bytes) + " bytes, or scales are missing");
}

}  // namespace minivllm::cuda
