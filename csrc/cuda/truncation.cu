// Launches the truncation of rows of logits.
#include "truncation.h"

#include "check.h"
#include "kernels.h"

namespace minivllm::cuda {

static_assert(sizeof(TruncationShared) <= 48 << 10, "what a thread block has without asking for more");

template <int kBlocks>
static void launch(const Truncation& t, int num_rows, cudaStream_t stream) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kBlocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(num_rows * kBlocks), config.blockDim = dim3(kTruncationThreads);
    config.dynamicSmemBytes = sizeof(TruncationShared), config.stream = stream;
    config.attrs = &cluster, config.numAttrs = kBlocks > 1;
    check(cudaLaunchKernelEx(&config, &truncate_rows<kTruncationThreads, kBlocks>, t), "truncate");
}

static int attribute_of_card(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "truncate: asking for the device");
    check(cudaDeviceGetAttribute(&value, attribute, device), "truncate: asking what the card can do");
    return value;
}

void truncate(const Truncation& t, int num_rows, cudaStream_t stream) {
    if (num_rows == 0) return;
    if (t.vocab_size > kMostTokens)
        throw std::invalid_argument("truncate: " + std::to_string(t.vocab_size) + " logits a row; the kernel takes " +
                                    std::to_string(kMostTokens));
    // As measured on an H100: of its 132 multiprocessors large clusters find no place on the last few.
    const bool has_clusters = attribute_of_card(cudaDevAttrClusterLaunch);
    const int num_places = has_clusters ? attribute_of_card(cudaDevAttrMultiProcessorCount) : 0;
    if (num_rows * 8 <= num_places * 3 / 4) launch<8>(t, num_rows, stream);
    else if (num_rows * 4 <= num_places * 3 / 4) launch<4>(t, num_rows, stream);
    else if (num_rows * 2 <= num_places) launch<2>(t, num_rows, stream);
    else launch<1>(t, num_rows, stream);
}

}  // namespace minivllm::cuda
