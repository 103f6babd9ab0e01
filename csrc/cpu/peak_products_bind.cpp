#include "peak_products.h"

#include <stdexcept>

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(peak_products, m) {
    m.def("peak_products", [](const std::string& dtype, int64_t rounds) {
        if (dtype == "bfloat16") return peak_products_kernels().bf16(rounds);
        if (dtype == "int8") return peak_products_kernels().int8(rounds);
        throw std::invalid_argument("peak_products multiplies bfloat16 or int8, not " + dtype);
    }, nb::arg("dtype"), nb::arg("rounds"), release_gil);
}

}  // namespace minivllm
