// Which instruction set the kernels use. Decided once from the processor; tests and MINIVLLM_CPU_ISA lower it.
#pragma once

#include <string>

namespace minivllm {

enum class Isa { none, avx2, avx512, amx };  // ascending: each includes those before it

const char* isa_name(Isa isa);
Isa parse_isa(const std::string& name);  // throws std::invalid_argument naming the known ones
Isa best_isa();                          // what processor, operating system and build allow
Isa active_isa();
void set_active_isa(Isa isa);  // throws std::invalid_argument when above best_isa()
void cap_active_isa(Isa isa);  // min(active, isa)

[[noreturn]] void throw_no_kernels(Isa isa);

#ifdef MINIVLLM_BUILD_AMX
#define MINIVLLM_AMX_TABLE(name) (&amx::name)
#else
#define MINIVLLM_AMX_TABLE(name) (&avx512::name)
#endif

// Declares an op's table of functions, one per instruction set, and `name()` / `name(isa)` which pick one:
//
//     struct MyOpKernels { void (*run)(float* x, int64_t n); };
//     MINIVLLM_KERNELS(MyOpKernels, my_op_kernels)
//
// Each compilation of my_op.cpp defines it as `const MyOpKernels my_op_kernels = {&run};` in its namespace.
// Must stand in namespace minivllm.
#define MINIVLLM_KERNELS(Table, name)                            \
    namespace avx2 { extern const Table name; }                  \
    namespace avx512 { extern const Table name; }                \
    namespace amx { extern const Table name; }                   \
    inline const Table& name(Isa isa) {                          \
        switch (isa) {                                           \
            case Isa::amx: return *MINIVLLM_AMX_TABLE(name);     \
            case Isa::avx512: return avx512::name;               \
            case Isa::avx2: return avx2::name;                   \
            default: throw_no_kernels(isa);                      \
        }                                                        \
    }                                                            \
    inline const Table& name() { return name(active_isa()); }

}  // namespace minivllm
