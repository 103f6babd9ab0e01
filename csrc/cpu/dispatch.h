// Which instruction set the kernels use. Decided once from the processor; tests and MINIVLLM_CPU_ISA lower it.
#pragma once

#include <string>

namespace minivllm {

// Ascending: each includes those before it.
enum class Isa { none, avx2, avx512, avx512_vnni, avx512_bf16, amx };

const char* isa_name(Isa isa);
Isa parse_isa(const std::string& name);  // throws std::invalid_argument naming the known ones
Isa best_isa();                          // what processor, operating system and build allow
Isa default_isa();                       // the best, but that avx512_bf16 is left out where its products are slow
Isa active_isa();                        // the default, unless set or capped
void set_active_isa(Isa isa);  // throws std::invalid_argument when above best_isa()
void cap_active_isa(Isa isa);  // min(active, isa)

[[noreturn]] void throw_no_kernels(Isa isa);

// Declares an op's table of functions, one per instruction set, and `name()` / `name(isa)` which pick one:
//
//     struct MyOpKernels { void (*run)(float* x, int64_t n); };
//     MINIVLLM_KERNELS(MyOpKernels, my_op_kernels)
//
// Each compilation of my_op.cpp defines it as `const MyOpKernels my_op_kernels = {&run};` in its namespace.
// Must stand in namespace minivllm.
//
// Two sets differ from avx512 by products only: avx512_vnni of bytes, avx512_bf16 of pairs of bfloat16. CMakeLists.txt
// says whose files are compiled for them too, and their tables are declared by the second and the third of these; all
// other ops are served by the set below.
#define MINIVLLM_KERNELS(Table, name) MINIVLLM_KERNELS_OF(Table, name, avx512, avx512)
#define MINIVLLM_BYTE_KERNELS(Table, name) MINIVLLM_KERNELS_OF(Table, name, MINIVLLM_VNNI, MINIVLLM_VNNI)
#define MINIVLLM_PAIR_KERNELS(Table, name) MINIVLLM_KERNELS_OF(Table, name, avx512, MINIVLLM_BF16)

#define MINIVLLM_KERNELS_OF(Table, name, vnni, bf16)             \
    namespace avx2 { extern const Table name; }                  \
    namespace avx512 { extern const Table name; }                \
    namespace avx512_vnni { extern const Table name; }           \
    namespace avx512_bf16 { extern const Table name; }           \
    namespace amx { extern const Table name; }                   \
    inline const Table& name(Isa isa) {                          \
        switch (isa) {                                           \
            case Isa::amx: return MINIVLLM_AMX::name;            \
            case Isa::avx512_bf16: return bf16::name;            \
            case Isa::avx512_vnni: return vnni::name;            \
            case Isa::avx512: return avx512::name;               \
            case Isa::avx2: return avx2::name;                   \
            default: throw_no_kernels(isa);                      \
        }                                                        \
    }                                                            \
    inline const Table& name() { return name(active_isa()); }

// A set that the compiler does not know is never active; something must stand there.
#ifdef MINIVLLM_BUILD_AVX512_VNNI
#define MINIVLLM_VNNI avx512_vnni
#else
#define MINIVLLM_VNNI avx512
#endif
#ifdef MINIVLLM_BUILD_AVX512_BF16
#define MINIVLLM_BF16 avx512_bf16
#else
#define MINIVLLM_BF16 avx512
#endif
#ifdef MINIVLLM_BUILD_AMX
#define MINIVLLM_AMX amx
#else
#define MINIVLLM_AMX avx512
#endif

}  // namespace minivllm
