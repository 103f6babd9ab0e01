// The module minivllm._cuda: addresses, sizes and a stream's handle as integers, as in csrc/bindings.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "decode_attention_sizes.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace minivllm::cuda;

namespace {

template <class T>
T* ptr(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

void decode_attention_call(uint64_t out, uint64_t q, uint64_t cache, std::array<uint64_t, 2> tables,
                           std::array<uint64_t, 2> parts, uint64_t sinks, std::array<int, 8> sizes, bool is_bf16, int kv,
                           std::array<int64_t, 4> strides, std::array<int64_t, 3> cache_strides,
                           std::array<float, 3> factors, uint64_t stream) {
    DecodeAttention p = {};
    p.out = ptr<void>(out), p.q = ptr<void>(q), p.cache = ptr<char>(cache);
    p.block_table = ptr<int32_t>(tables[0]), p.seq_lens = ptr<int32_t>(tables[1]);
    p.part_sums = ptr<float>(parts[0]), p.part_tops = ptr<float>(parts[1]), p.sinks = ptr<float>(sinks);
    p.num_reqs = sizes[0], p.num_heads = sizes[1], p.num_kv_heads = sizes[2], p.head_dim = sizes[3];
    p.block_size = sizes[4], p.max_segments = sizes[5], p.window = sizes[6], p.num_parts = sizes[7];
    p.is_bf16 = is_bf16;
    p.q_token_stride = strides[0], p.q_head_stride = strides[1], p.out_token_stride = strides[2];
    p.table_stride = strides[3];
    p.block_bytes = cache_strides[0], p.half_bytes = cache_strides[1], p.head_bytes = cache_strides[2];
    p.scale = factors[0], p.softcap = factors[1], p.value_scale = factors[2];
    decode_attention(p, KvType(kv), ptr<CUstream_st>(stream));
}

void truncate_call(uint64_t logits, uint64_t top_k, uint64_t top_p, uint64_t min_p, int64_t row_stride, int vocab_size,
                   int num_rows, uint64_t stream) {
    const Truncation t{ptr<float>(logits), ptr<int32_t>(top_k), ptr<float>(top_p), ptr<float>(min_p), row_stride,
                       vocab_size};
    truncate(t, num_rows, ptr<CUstream_st>(stream));
}

void copy_blocks_call(uint64_t from, uint64_t to, int num_layers, uint64_t pairs, int num_pairs, int64_t block_bytes,
                      uint64_t stream) {
    copy_blocks(ptr<uint64_t>(from), ptr<uint64_t>(to), num_layers, ptr<int64_t>(pairs), num_pairs, block_bytes,
                ptr<CUstream_st>(stream));
}

void copy_ranges_call(const std::vector<std::array<uint64_t, 3>>& ranges, uint64_t stream) {
    std::vector<Range> list;
    list.reserve(ranges.size());
    for (const auto& [from, to, bytes] : ranges) list.push_back({from, to, bytes});
    copy_ranges(list, ptr<CUstream_st>(stream));
}

}  // namespace

NB_MODULE(_cuda, m) {
    nb::set_leak_warnings(false);
    constexpr nb::call_guard<nb::gil_scoped_release> release_gil{};
    m.def("decode_attention", &decode_attention_call, release_gil);
    m.def("truncate", &truncate_call, release_gil);
    m.def("copy_blocks", &copy_blocks_call, release_gil);
    m.def("copy_ranges", &copy_ranges_call, release_gil);
}
