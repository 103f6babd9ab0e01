#include "linear.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include <nanobind/stl/array.h>

#include "../bindings.h"
#include "linear_parts.h"
#include "rotary_kv_write.h"
#include "row_ids.h"
#include "thread_pool.h"

namespace minivllm {
namespace {

// How one weight matrix is packed: its sizes, and the instruction set that was in use when it was made, which stays
// the one that reads it.
template <const LinearKernels& (*kernels_in_use)()>
struct Format {
    Format(int dtype, int64_t n, int64_t k, bool interleaved)
        : kernels(kernels_in_use()), dtype(DType(dtype)), n(n), k(k), interleaved(interleaved),
          nbytes(kernels.packed_bytes(DType(dtype), n, k, interleaved)) {}

    bool operator==(const Format& other) const {
        return &kernels == &other.kernels && dtype == other.dtype && n == other.n && k == other.k &&
               interleaved == other.interleaved;
    }

    void load_rows(uintptr_t packed, int64_t start, uintptr_t source, int source_dtype, int64_t source_stride,
                   int64_t rows) const {
        kernels.load_rows(ptr<void>(packed), {dtype, n, k, start, rows, ptr<const void>(source), DType(source_dtype),
                                              source_stride, interleaved});
    }

    void gather_rows(uintptr_t out, uintptr_t packed, uintptr_t ids, int64_t num_ids) const {
        check_rows(ptr<const int64_t>(ids), num_ids, n);
        kernels.gather_rows(dtype, ptr<void>(out), ptr<const void>(packed), n, k, ptr<const int64_t>(ids), num_ids);
    }

    void multiply(uintptr_t out, int out_dtype, int64_t out_stride, int epilogue, uintptr_t x, int64_t x_stride,
                  int64_t m, uintptr_t packed, uintptr_t bias, int bias_dtype, uintptr_t addend,
                  int64_t addend_stride, uintptr_t norm, int norm_dtype, float norm_eps) const {
        kernels.multiply({dtype, m, n, k, ptr<const void>(x), x_stride, ptr<const void>(packed), ptr<const void>(bias),
                          DType(bias_dtype), ptr<const float>(addend), addend_stride, Epilogue(epilogue),
                          ptr<void>(out), DType(out_dtype), out_stride,
                          RowNorm{ptr<const void>(norm), DType(norm_dtype), norm_eps}});
    }

    // residual += down(silu(gate) * up) of x, this being the weight of gate and up.
    void multiply_gated(uintptr_t residual, int64_t residual_stride, uintptr_t x, int64_t x_stride, int64_t m,
                        uintptr_t packed, uintptr_t bias, int bias_dtype, const Format& down, uintptr_t down_packed,
                        uintptr_t down_bias, int down_bias_dtype, uintptr_t norm, int norm_dtype, float norm_eps) const {
        LinearCall first{}, second{};
        first.dtype = dtype, first.m = m, first.n = n, first.k = k;
        first.x = ptr<const void>(x), first.x_stride = x_stride, first.packed = ptr<const void>(packed);
        first.bias = ptr<const void>(bias), first.bias_dtype = DType(bias_dtype);
        first.epilogue = Epilogue::silu_mul;
        first.norm = {ptr<const void>(norm), DType(norm_dtype), norm_eps};
        second.dtype = dtype, second.m = m, second.n = down.n, second.k = down.k;
        second.packed = ptr<const void>(down_packed);
        second.bias = ptr<const void>(down_bias), second.bias_dtype = DType(down_bias_dtype);
        second.epilogue = Epilogue::add_residual;
        second.out = ptr<void>(residual), second.out_dtype = dtype, second.out_stride = residual_stride;
        multiply_pair(kernels, first, down.kernels, second);
    }

    // rows: m, stride of x, stride of the addend; sizes: heads of queries, of keys, head_dim, blocks, tokens in one,
    // positions in the table, dimensions that turn; place: the cache, slots, and where a step that leaves its keys and
    // values to attention has them (0 where none does).
    void turn_and_write(const std::array<int64_t, 3>& rows, const std::array<int64_t, 7>& sizes,
                        const std::array<uintptr_t, 6>& product, const std::array<uintptr_t, 4>& turn,
                        const std::array<uintptr_t, 3>& place, int bias_dtype, int norm_dtype, float norm_eps, int kv_type,
                        float eps, float k_scale, float v_scale) const {
        const auto [m, x_stride, addend_stride] = rows;
        const auto [q_heads, kv_heads, head_dim, num_blocks, block_size, max_position, rot_dim] = sizes;
        const auto [q, x, packed, bias, addend, norm] = product;
        const auto [positions, cos_sin, q_norm, k_norm] = turn;
        const auto [cache, slots, kept] = place;
        const KvLayout layout{KvType(kv_type), kv_heads, head_dim, block_size};
        const KvWrite write{ptr<char>(cache), layout, nullptr, nullptr, ptr<const int64_t>(slots), dtype, m, 0, 0, 0, 0,
                            k_scale, v_scale};
        check_positions(ptr<const int64_t>(positions), m, max_position);
        check(write, num_blocks);
        const HeadsEnd end{q_heads, ptr<const void>(q_norm), ptr<const void>(k_norm), eps, ptr<const int64_t>(positions),
                           ptr<const float>(cos_sin), rot_dim, write, &heads_kernels(),
                           is_left_to_attention(layout, m) ? ptr<void>(kept) : nullptr};
        LinearCall call{dtype, m, n, k, ptr<const void>(x), x_stride, ptr<const void>(packed), ptr<const void>(bias),
                        DType(bias_dtype), ptr<const float>(addend), addend_stride, Epilogue::heads, ptr<void>(q),
                        dtype, q_heads * head_dim};
        call.heads = &end;
        call.norm = {ptr<const void>(norm), DType(norm_dtype), norm_eps};
        if (m == 1) turn_and_write_behind(call);
        else kernels.multiply(call);
    }

    // The same for one row by two kernels, which is as fast or faster (benchmarks/LOG.md): in one, the thread whose heads
    // are keys and values waits for the cache's lines while it reads no weight.
    void turn_and_write_behind(LinearCall call) const {
        const HeadsEnd& end = *call.heads;
        const int64_t head_dim = end.write.layout.head_dim, kv_heads = end.write.layout.num_kv_heads;
        const int64_t size = size_of(dtype), q_bytes = end.num_q_heads * head_dim * size;
        char* heads = static_cast<char*>(thread_scratch(3, size_t(n * size)));
        char *q = static_cast<char*>(call.out), *k = heads + q_bytes;
        call.epilogue = Epilogue::store, call.out = heads, call.out_stride = n;
        kernels.multiply(call);
        std::memcpy(q, heads, size_t(q_bytes));
        KvWrite write = end.write;
        write.v = k + kv_heads * head_dim * size, write.v_head_stride = head_dim * size;
        rotary_kv_write_kernels().run({q, end.num_q_heads, 0, head_dim, end.q_norm}, {k, kv_heads, 0, head_dim, end.k_norm},
                                      write, end.eps, end.positions, end.cos_sin, end.rot_dim);
    }

    void likeliest(uintptr_t token_ids, uintptr_t broken, uintptr_t x, int64_t x_stride, int64_t m,
                   uintptr_t packed) const {
        Leader* leaders = static_cast<Leader*>(thread_scratch(3, size_t(m) * sizeof(Leader)));
        for (int64_t r = 0; r < m; ++r) leaders[r] = {-std::numeric_limits<float>::infinity(), INT32_MAX};
        LinearCall call{};
        call.dtype = dtype, call.m = m, call.n = n, call.k = k;
        call.x = ptr<const void>(x), call.x_stride = x_stride, call.packed = ptr<const void>(packed);
        call.epilogue = Epilogue::lead, call.out = leaders;
        kernels.multiply(call);
        for (int64_t r = 0; r < m; ++r) {
            ptr<int64_t>(token_ids)[r] = leaders[r].index;
            ptr<uint8_t>(broken)[r] = !std::isfinite(leaders[r].value);
        }
    }

    const LinearKernels& kernels;
    DType dtype;
    int64_t n, k;
    bool interleaved;
    int64_t nbytes;
};

template <class F>
void bind_format(nb::module_& m, const char* name) {
    nb::class_<F>(m, name)
        .def(nb::init<int, int64_t, int64_t, bool>(), nb::arg("dtype"), nb::arg("out_features"),
             nb::arg("in_features"), nb::arg("interleaved"))
        .def_ro("nbytes", &F::nbytes)
        .def("load_rows", &F::load_rows, release_gil)
        .def("gather_rows", recordable("gather_rows", [](const F& format, uintptr_t out, uintptr_t packed,
                                                         uintptr_t ids, int64_t num_ids) {
                 format.gather_rows(out, packed, ids, num_ids);
             }),
             release_gil)
        .def("multiply", recordable("multiply",
             [](const F& format, uintptr_t out, int out_dtype, int64_t out_stride, int epilogue, uintptr_t x,
                int64_t x_stride, int64_t m, uintptr_t packed, uintptr_t bias, int bias_dtype, uintptr_t addend,
                int64_t addend_stride, uintptr_t norm, int norm_dtype, float norm_eps) {
                 format.multiply(out, out_dtype, out_stride, epilogue, x, x_stride, m, packed, bias, bias_dtype, addend,
                                 addend_stride, norm, norm_dtype, norm_eps);
             }),
             release_gil)
        .def("multiply_gated", recordable("multiply_gated",
             [](const F& format, uintptr_t residual, int64_t residual_stride, uintptr_t x, int64_t x_stride, int64_t m,
                uintptr_t packed, uintptr_t bias, int bias_dtype, const F& down, uintptr_t down_packed,
                uintptr_t down_bias, int down_bias_dtype, uintptr_t norm, int norm_dtype, float norm_eps) {
                 format.multiply_gated(residual, residual_stride, x, x_stride, m, packed, bias, bias_dtype, down,
                                       down_packed, down_bias, down_bias_dtype, norm, norm_dtype, norm_eps);
             }),
             release_gil)
        .def("turn_and_write", recordable("turn_and_write",
             [](const F& format, std::array<int64_t, 3> rows, std::array<int64_t, 7> sizes,
                std::array<uintptr_t, 6> product, std::array<uintptr_t, 4> turn, std::array<uintptr_t, 3> place,
                int bias_dtype, int norm_dtype, float norm_eps, int kv_type, float eps, float k_scale, float v_scale) {
                 format.turn_and_write(rows, sizes, product, turn, place, bias_dtype, norm_dtype, norm_eps, kv_type, eps,
                                       k_scale, v_scale);
             }),
             release_gil)
        .def("likeliest", recordable("likeliest",
             [](const F& format, uintptr_t token_ids, uintptr_t broken, uintptr_t x, int64_t x_stride, int64_t m,
                uintptr_t packed) {
                 format.likeliest(token_ids, broken, x, x_stride, m, packed);
             }),
             release_gil);
}

}  // namespace

MINIVLLM_BIND(linear, m) {
    bind_format<Format<&linear_kernels>>(m, "LinearFormat");
    bind_format<Format<&int8_linear_kernels>>(m, "Int8LinearFormat");
    bind_format<Format<&int4_linear_kernels>>(m, "Int4LinearFormat");
}

}  // namespace minivllm
