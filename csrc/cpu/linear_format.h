// What the bindings of the two kinds of linear layer share. Included by linear*_bind.cpp only.
#pragma once

#include <stdexcept>

#include "../bindings.h"
#include "linear.h"

namespace minivllm {

inline void check_rows(const int64_t* rows, int64_t num_rows, int64_t n) {
    for (int64_t i = 0; i < num_rows; ++i)
        if (rows[i] < 0 || rows[i] >= n)
            throw std::out_of_range("row " + std::to_string(rows[i]) + " is outside the " + std::to_string(n) +
                                    " rows of the weight");
}

// How one weight matrix is packed: its sizes, and the instruction set that was in use when it was made, which stays
// the one that reads it.
template <class Format>
void bind_linear_format(nb::module_& m, const char* name) {
    nb::class_<Format>(m, name)
        .def(nb::init<int, int64_t, int64_t, bool>(), nb::arg("dtype"), nb::arg("out_features"),
             nb::arg("in_features"), nb::arg("interleaved"))
        .def_ro("nbytes", &Format::nbytes)
        .def("load_rows", &Format::load_rows, release_gil)
        .def("gather_rows", recordable("gather_rows", [](const Format& format, uintptr_t out, uintptr_t packed,
                                                         uintptr_t ids, int64_t num_ids) {
                 format.gather_rows(out, packed, ids, num_ids);
             }),
             release_gil)
        .def("multiply", recordable("multiply",
             [](const Format& format, uintptr_t out, int out_dtype, int64_t out_stride, int epilogue, uintptr_t x,
                int64_t x_stride, int64_t m, uintptr_t packed, uintptr_t bias, int bias_dtype, uintptr_t addend,
                int64_t addend_stride) {
                 format.multiply({format.dtype, m, format.n, format.k, ptr<const void>(x), x_stride,
                                  ptr<const void>(packed), ptr<const void>(bias), DType(bias_dtype),
                                  ptr<const float>(addend), addend_stride, Epilogue(epilogue), ptr<void>(out),
                                  DType(out_dtype), out_stride});
             }),
             release_gil);
}

}  // namespace minivllm
