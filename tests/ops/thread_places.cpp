// The pool's placing of its workers on a machine that is made up: what it asks of the system, and tells it, goes here.
#include <pthread.h>
#include <sched.h>

#include <cerrno>
#include <cstdio>

#include "thread_pool.h"

namespace {

int here = 0;
bool is_refused = false;
cpu_set_t usable, given;

void have(int first, int last) {
    CPU_ZERO(&usable);
    for (int i = first; i <= last; ++i) CPU_SET(i, &usable);
}

// Kernels, as many as it takes to see a change, then where workers may run.
void run(const char* what, int num_calls) {
    for (int i = 0; i < num_calls; ++i) minivllm::run_on_threads(4, [](void*, int) {}, nullptr);
    std::printf("%s:", what);
    for (int i = 0; i < CPU_SETSIZE; ++i)
        if (CPU_ISSET(i, &given)) std::printf(" %d", i);
    std::puts("");
}

}  // namespace

extern "C" int __wrap_sched_getcpu() { return here; }
extern "C" int __wrap_sched_getaffinity(pid_t, size_t, cpu_set_t* set) { return *set = usable, 0; }
extern "C" int __wrap_pthread_setaffinity_np(pthread_t, size_t, const cpu_set_t* set) {
    if (!is_refused) given = *set;
    return is_refused ? EPERM : 0;
}

int main() {
    have(0, 3);
    minivllm::set_num_threads(4);
    run("room", 1);
    here = 2, run("moved", 1);
    here = 0, have(0, 1), run("shrunk", 1024);
    have(0, 7), run("grown", 1024);
    have(0, 0), run("caller bound", 1024);
    have(0, 3), is_refused = true, here = 3, run("refused", 1024);
}
