#include "linear.h"

#include "linear_format.h"

namespace minivllm {

struct LinearFormat {
    LinearFormat(int dtype, int64_t n, int64_t k, bool interleaved)
        : kernels(linear_kernels()), dtype(DType(dtype)), n(n), k(k), interleaved(interleaved),
          nbytes(kernels.packed_bytes(DType(dtype), n, k, interleaved)) {}

    void load_rows(uintptr_t packed, int64_t start, uintptr_t source, int source_dtype, int64_t source_stride,
                   int64_t rows) const {
        kernels.load_rows(ptr<void>(packed), {dtype, n, k, start, rows, ptr<const void>(source), DType(source_dtype),
                                              source_stride, interleaved});
    }

    void gather_rows(uintptr_t out, uintptr_t packed, uintptr_t ids, int64_t num_ids) const {
        check_rows(ptr<const int64_t>(ids), num_ids, n);
        kernels.gather_rows(dtype, ptr<void>(out), ptr<const void>(packed), k, ptr<const int64_t>(ids), num_ids);
    }

    void multiply(const LinearCall& call) const { kernels.multiply(call); }

    const LinearKernels& kernels;
    DType dtype;
    int64_t n, k;
    bool interleaved;
    int64_t nbytes;
};

MINIVLLM_BIND(linear, m) { bind_linear_format<LinearFormat>(m, "LinearFormat"); }

}  // namespace minivllm
