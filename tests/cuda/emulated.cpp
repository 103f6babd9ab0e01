// The CUDA kernels on a CPU, by ctypes: see emulate.h and test_emulated.py.
#include "decode_attention_launch.h"
#include "kv_copy.h"
#include "truncation.h"

using namespace minivllm::cuda;

extern "C" int emulated_decode(void* out, const void* q, const char* cache, const int32_t* table, const int32_t* seq_lens,
                               float* part_sums, float* part_tops, const float* sinks, const int64_t* sizes,
                               const float* factors, int kv) {
    DecodeAttention p = {};
    p.out = out, p.q = q, p.cache = cache, p.block_table = table, p.seq_lens = seq_lens;
    p.part_sums = part_sums, p.part_tops = part_tops, p.sinks = sinks;
    p.num_reqs = int(sizes[0]), p.num_heads = int(sizes[1]), p.num_kv_heads = int(sizes[2]), p.head_dim = int(sizes[3]);
    p.block_size = int(sizes[4]), p.max_segments = int(sizes[5]), p.window = int(sizes[6]), p.num_parts = int(sizes[7]);
    p.is_bf16 = sizes[8] != 0;
    p.q_token_stride = sizes[9], p.q_head_stride = sizes[10], p.out_token_stride = sizes[11], p.table_stride = sizes[12];
    p.block_bytes = sizes[13], p.half_bytes = sizes[14], p.head_bytes = sizes[15];
    p.scale = factors[0], p.softcap = factors[1], p.value_scale = factors[2];
    const bool is_served = visit_decode_kernel(p, KvType(kv), [&](auto kernel, int shared_bytes) {
        run_grid(kernel, {p.num_kv_heads, p.num_reqs, p.num_parts}, kThreads, shared_bytes, p);
    });
    if (is_served && p.max_segments > 1) run_grid(&merge_segments, {p.num_heads, p.num_reqs, 1}, p.head_dim, 0, p);
    return is_served;
}

extern "C" void emulated_copy_blocks(const uint64_t* from, const uint64_t* to, int num_layers, const int64_t* pairs,
                                     int num_pairs, int64_t block_bytes) {
    run_grid(&copy_blocks_kernel, {num_pairs, num_layers, 1}, kCopyThreads, 0, from, to, pairs, block_bytes);
}

// Fewer threads than a card's blocks have, for speed; no result depends on how many.
extern "C" void emulated_truncate(float* logits, const int32_t* top_k, const float* top_p, const float* min_p,
                                  int64_t row_stride, int vocab_size, int num_rows, bool is_by_cluster) {
    const Truncation t{logits, top_k, top_p, min_p, row_stride, vocab_size};
    if (is_by_cluster) run_clusters(&truncate_rows<64, 8>, num_rows, 8, 64, sizeof(TruncationShared), t);
    else run_clusters(&truncate_rows<128, 1>, num_rows, 1, 128, sizeof(TruncationShared), t);
}
