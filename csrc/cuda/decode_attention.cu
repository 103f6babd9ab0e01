// Launches the decode kernels.
#include "check.h"
#include "decode_attention_launch.h"
#include "kernels.h"

namespace minivllm::cuda {

void decode_attention(const DecodeAttention& p, KvType kv, cudaStream_t stream) {
    if (p.num_reqs == 0) return;
    const dim3 grid(p.num_kv_heads, p.num_reqs, p.num_parts);
    const bool is_served = visit_decode_kernel(p, kv, [&](auto kernel, int shared_bytes) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
              "decode_attention: reserving shared memory");
        kernel<<<grid, kThreads, shared_bytes, stream>>>(p);
        check(cudaGetLastError(), "decode_attention");
    });
    if (!is_served)
        throw std::invalid_argument("decode_attention: no kernel for head_dim " + std::to_string(p.head_dim) +
                                    " and " + std::to_string(p.num_heads / p.num_kv_heads) +
                                    " heads a KV head with this cache, in " + std::to_string(p.num_parts) + " parts");
    if (p.max_segments > 1) {
        merge_segments<<<dim3(p.num_heads, p.num_reqs), p.head_dim, 0, stream>>>(p);
        check(cudaGetLastError(), "decode_attention: merging");
    }
}

}  // namespace minivllm::cuda
