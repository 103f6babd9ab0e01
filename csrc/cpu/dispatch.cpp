#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace minivllm {

static const char* const kNames[] = {"none", "avx2", "avx512", "amx"};

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

Isa parse_isa(const std::string& name) {
    for (Isa isa : {Isa::avx2, Isa::avx512, Isa::amx})
        if (name == isa_name(isa)) return isa;
    throw std::invalid_argument("unknown instruction set '" + name + "'; known: avx2, avx512, amx");
}

#if defined(__x86_64__)

static bool bit(unsigned word, int index) { return (word >> index) & 1; }

// The register state the operating system saves and restores (XCR0).
static unsigned saved_state() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// Linux hands out the 8 KiB of tile registers per process, on request.
static bool request_tile_registers() {
#if defined(__linux__)
    constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
    return false;
#endif
}

static Isa detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::none;
    const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!(fma && osxsave && avx && f16c)) return Isa::none;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::none;
    const unsigned state = saved_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    const bool vbmi = bit(c, 1);
    const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    if (!(ymm && bit(b, 5))) return Isa::none;
    if (!(zmm && avx512)) return Isa::avx2;
#ifdef MINIVLLM_BUILD_AMX
    const bool amx = tiles && vbmi && bit(d, 24) && bit(d, 22);
    if (amx && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5) && request_tile_registers()) return Isa::amx;
#else
    (void)tiles;
    (void)vbmi;
#endif
    return Isa::avx512;
}

#else
static Isa detect() { return Isa::none; }
#endif

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

static std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

Isa active_isa() { return active(); }

void set_active_isa(Isa isa) {
    if (isa > best_isa())
        throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa) +
                                    " kernels; the best it has is " + isa_name(best_isa()));
    active() = isa;
}

void cap_active_isa(Isa isa) { active() = std::min(active_isa(), isa); }

void throw_no_kernels(Isa isa) {
    throw std::runtime_error(std::string("no native kernels for instruction set '") + isa_name(isa) +
                             "'; use the reference implementation");
}

}  // namespace minivllm
