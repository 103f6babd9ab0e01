// What every <op>_bind.cpp includes: nanobind, pointers from integers, registration, calls that can be recorded.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <type_traits>

#include "tape.h"

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

template <class F>
struct Recordable : Recordable<decltype(&F::operator())> {};  // of a lambda

template <class Owner, class... Args>
struct Recordable<void (Owner::*)(Args...) const> : Recordable<void (*)(Args...)> {};

template <class... Args>
struct Recordable<void (*)(Args...)> {
    template <class F>
    static auto wrap(const char* name, F f) {
        return [name, f](Args... args) {
            if (Tape* tape = Tape::recording()) {
                tape->add(std::make_unique<CallOf<F, std::decay_t<Args>...>>(name, f, args...));
                if (tape->is_dry) return;
            }
            f(args...);
        };
    }
};

// `f`, a function or lambda without a result, whose calls go onto the tape that this thread records, arguments by value.
// Of arguments that are int64_t the tape may make sizes (tape.h); all others are compared with ==.
// All ops are registered so; what is not makes a recording unusable, and minivllm/ops/recording.py says so.
template <class F>
auto recordable(const char* name, F f) {
    return Recordable<F>::wrap(name, f);
}

// Registers a function that can be recorded and runs without Python's lock.
template <class F>
void def_op(nb::module_& m, const char* name, F f) {
    m.def(name, recordable(name, f), release_gil);
}

// An address that came from `Tensor.data_ptr()`; 0 is a null pointer.
template <class T>
T* ptr(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace minivllm
