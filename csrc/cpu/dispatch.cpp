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

static const char* const kNames[] = {"none", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

Isa parse_isa(const std::string& name) {
    for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16, Isa::amx})
        if (name == isa_name(isa)) return isa;
    throw std::invalid_argument("unknown instruction set '" + name +
                                "'; known: avx2, avx512, avx512_vnni, avx512_bf16, amx");
}

namespace {
struct Detected {
    Isa best = Isa::none, by_default = Isa::none;
};
}  // namespace

#if defined(__x86_64__)

static bool is_built(Isa isa) {
    switch (isa) {
#ifndef MINIVLLM_BUILD_AVX512_VNNI
        case Isa::avx512_vnni: return false;
#endif
#ifndef MINIVLLM_BUILD_AVX512_BF16
        case Isa::avx512_bf16: return false;
#endif
#ifndef MINIVLLM_BUILD_AMX
        case Isa::amx: return false;
#endif
        default: return true;
    }
}

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

static Isa detect_best() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::none;
    const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!(fma && osxsave && avx && f16c)) return Isa::none;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::none;
    const unsigned state = saved_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    const bool vbmi = bit(c, 1), vnni = bit(c, 11);
    const bool amx = tiles && vbmi && bit(d, 24) && bit(d, 25) && bit(d, 22);
    if (!(ymm && bit(b, 5))) return Isa::none;
    if (!(zmm && avx512)) return Isa::avx2;
    const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    if (is_built(Isa::amx) && vnni && bf16 && amx && request_tile_registers()) return Isa::amx;
    if (is_built(Isa::avx512_bf16) && vnni && bf16) return Isa::avx512_bf16;
    if (is_built(Isa::avx512_vnni) && vnni) return Isa::avx512_vnni;
    return Isa::avx512;
}

// Intel's processors from Sapphire Rapids on, which have AVX512_FP16 as well, take nearly twice as long for vdpbf16ps as
// for the two fmas that do the same (measured); AMD's are said to take half as long as for those.
static bool has_slow_pairs() {
    unsigned a, b, c, d;
    const bool is_intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
    return is_intel && __get_cpuid_count(7, 0, &a, &b, &c, &d) && bit(d, 23);
}

static Detected detect() {
    const Isa best = detect_best();
    return {best, best == Isa::avx512_bf16 && has_slow_pairs() ? Isa::avx512_vnni : best};
}

#else
static Detected detect() { return {}; }
#endif

static const Detected& detected() {
    static const Detected isas = detect();
    return isas;
}

Isa best_isa() { return detected().best; }
Isa default_isa() { return detected().by_default; }

static std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{default_isa()};
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
