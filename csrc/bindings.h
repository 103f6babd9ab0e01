// What every <op>_bind.cpp includes: nanobind, pointers from integers, registration.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

namespace nb = nanobind;

namespace minivllm {

// A list, built by static initialisers, of the functions that add an op to the module.
class BindRegistrar {
public:
    explicit BindRegistrar(void (*bind)(nb::module_&));
    static void bind_all(nb::module_& m);

private:
    void (*bind_)(nb::module_&);
    BindRegistrar* next_;
};

#define MINIVLLM_BIND(op, m)                                        \
    static void bind_##op(nb::module_& m);                          \
    static minivllm::BindRegistrar registrar_of_##op(&bind_##op);   \
    static void bind_##op(nb::module_& m)

inline constexpr nb::call_guard<nb::gil_scoped_release> release_gil{};

// An address that came from `Tensor.data_ptr()`; 0 is a null pointer.
template <class T>
T* ptr(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace minivllm
