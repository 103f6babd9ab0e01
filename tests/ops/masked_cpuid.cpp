// To be preloaded: a processor with fewer features. What MASKED_CPUID names ("leaf:subleaf:register:bit", by commas, all
// in decimal, registers eax to edx 0 to 3; only leaf 7 has subleaves) is gone from the answers of `cpuid`, which is made
// to fault for this thread and answered in the signal's handler (Linux, processors that can; the others exit with 77).
#include <asm/prctl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cpuid.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Mask { unsigned leaf, subleaf, reg, bit; } masks[32];
int num_masks = 0;

bool set_faulting(bool on) { return syscall(SYS_arch_prctl, 0x1012 /* ARCH_SET_CPUID */, on ? 0 : 1) == 0; }

void answer(int, siginfo_t*, void* context) {
    greg_t* r = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const unsigned char* code = reinterpret_cast<const unsigned char*>(r[REG_RIP]);
    if (code[0] != 0x0f || code[1] != 0xa2) {  // a fault of another kind: let it happen
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    const unsigned leaf = unsigned(r[REG_RAX]), subleaf = unsigned(r[REG_RCX]);
    unsigned out[4];
    set_faulting(false);
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
    set_faulting(true);
    for (int i = 0; i < num_masks; ++i)
        if (masks[i].leaf == leaf && (leaf != 7 || masks[i].subleaf == subleaf))
            out[masks[i].reg] &= ~(1u << masks[i].bit);
    r[REG_RAX] = out[0], r[REG_RBX] = out[1], r[REG_RCX] = out[2], r[REG_RDX] = out[3];
    r[REG_RIP] += 2;
}

__attribute__((constructor)) void begin() {
    for (const char* at = getenv("MASKED_CPUID"); at != nullptr && num_masks < 32;) {
        Mask& m = masks[num_masks];
        if (std::sscanf(at, "%u:%u:%u:%u", &m.leaf, &m.subleaf, &m.reg, &m.bit) == 4) ++num_masks;
        at = std::strchr(at, ',');
        if (at != nullptr) ++at;
    }
    struct sigaction action {};
    action.sa_sigaction = &answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    if (!set_faulting(true)) _exit(77);
}

}  // namespace
