// The extension module: processor capabilities, threads, and whatever the ops register.
//
// To add an op: write cpu/<op>.h (the table of functions), cpu/<op>.cpp (the kernels, see cpu/isa.h) and
// cpu/<op>_bind.cpp:
//
//     MINIVLLM_BIND(my_op, m) {
//         def_op(m, "my_op", [](uintptr_t x, int64_t n) { my_op_kernels().run(ptr<float>(x), n); });
//     }
//
// Nothing here or in CMakeLists.txt changes. Functions take addresses, shapes and strides as integers and
// release the GIL; who calls them (minivllm/ops/<op>.py) keeps the tensors alive and checks their shapes.
#include "bindings.h"

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace minivllm {

static BindRegistrar* first_registrar = nullptr;

BindRegistrar::BindRegistrar(void (*bind)(nb::module_&)) : bind_(bind), next_(first_registrar) {
    first_registrar = this;
}

void BindRegistrar::bind_all(nb::module_& m) {
    for (BindRegistrar* r = first_registrar; r != nullptr; r = r->next_) r->bind_(m);
}

static std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (int i = int(Isa::avx2); i <= int(best_isa()); ++i) names.push_back(isa_name(Isa(i)));
    return names;
}

static void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
    madvise(ptr<void>(address), bytes, MADV_HUGEPAGE);  // advice: where there are none, all works without
#endif
}

}  // namespace minivllm

NB_MODULE(_native, m) {
    using namespace minivllm;
    nb::set_leak_warnings(false);
    m.def("isa", [] { return std::string(isa_name(active_isa())); },
          "The instruction set in use: one of supported_isas(), or 'none' (no kernel can run here).");
    m.def("default_isa", [] { return std::string(isa_name(default_isa())); },
          "The one in use unless told otherwise: the last of supported_isas(), or the one before where that is slow.");
    m.def("supported_isas", &supported_isas, "The instruction sets this processor and build have, ascending.");
    m.def("set_isa", [](const std::string& name) { set_active_isa(parse_isa(name)); }, nb::arg("name"),
          "Use this instruction set from now on. Weights packed before keep the one they were packed for.");
    m.def("cap_isa", [](const std::string& name) { cap_active_isa(parse_isa(name)); }, nb::arg("name"),
          "Use nothing above this instruction set; no error if the processor has less.");
    m.def("num_threads", &num_threads, "Threads that share a kernel's work, the calling one included.");
    m.def("set_num_threads", &set_num_threads, nb::arg("n"), nb::arg("processors") = std::vector<int>(), release_gil,
          "The threads but the calling one are bound to `processors`, one each from the second on; [] binds none.");
    m.def("stay_awake", &stay_awake, nb::arg("on"),
          "While on, the threads wait for the next kernel awake for a millisecond instead of some 30 µs.");
    m.def("advise_huge_pages", &advise_huge_pages, nb::arg("address"), nb::arg("bytes"));
    nb::class_<Tape>(m, "Tape")
        .def(nb::init<bool, Tape*>(), nb::arg("is_dry") = false, nb::arg("after").none() = nullptr,
             nb::keep_alive<1, 3>())
        .def("start", &Tape::start)
        .def("stop", &Tape::stop)
        .def("__len__", &Tape::size)
        .def_prop_ro("names", &Tape::names)
        .def("follow_sizes", &Tape::follow_sizes, nb::arg("others"), nb::arg("own"), nb::arg("theirs"))
        .def("replay", &Tape::replay, nb::arg("sizes") = std::vector<int64_t>(), release_gil)
        .def("timed_replay", &Tape::timed_replay, release_gil);
    BindRegistrar::bind_all(m);
}
