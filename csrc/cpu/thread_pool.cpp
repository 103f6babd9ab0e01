#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace minivllm {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the gap between two kernels of a layer, shorter than anyone would notice as load.
constexpr std::chrono::microseconds kSpin{30}, kAwakeSpin{1000};
constexpr int kPausesToALook = 16;  // at the clock; a pause takes 10 to 60 ns, by processor
constexpr unsigned kCallsToALook = 1024;  // some steps; a look takes 0.2 µs

std::atomic<bool> is_awake{false};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

thread_local bool inside_kernel = false;

// A value that threads wait on: a brief spin, then sleep.
class Gate {
public:
    void set(uint64_t value) {
        value_.store(value, std::memory_order_seq_cst);
        wake_sleepers();
    }
    void add(uint64_t delta) {
        value_.fetch_add(delta, std::memory_order_seq_cst);
        wake_sleepers();
    }
    uint64_t get() const { return value_.load(std::memory_order_acquire); }

    // Returns the first value seen for which done(value).
    template <class Done>
    uint64_t wait(Done done) {
        const Clock::time_point begin = Clock::now();
        do {
            for (int i = 0; i < kPausesToALook; ++i) {
                if (uint64_t v = get(); done(v)) return v;
                relax();
            }
        } while (Clock::now() - begin < (is_awake.load(std::memory_order_relaxed) ? kAwakeSpin : kSpin));
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        uint64_t v;
        condition_.wait(lock, [&] { return done(v = value_.load(std::memory_order_seq_cst)); });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        return v;
    }

private:
    // A sleeper registers before it last looks at the value, a setter changes the value before it looks for
    // sleepers: one of the two sees the other.
    void wake_sleepers() {
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        condition_.notify_all();
    }

    std::atomic<uint64_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable condition_;
};

class Pool {
public:
    Pool(int num_threads, const std::vector<int>& processors)
        : num_threads_(num_threads), may_move_(processors.empty()) {
        for (int i = 1; i < num_threads; ++i) {
            workers_.emplace_back([this] { work(); });
            if (!processors.empty()) bind(workers_.back(), processors[size_t(i) % processors.size()]);
        }
    }

    ~Pool() {
        stopping_ = true;
        epoch_.add(1);
        for (std::thread& t : workers_) t.join();
    }

    int num_threads() const { return num_threads_; }

    // The caller takes index 0, and then whatever no worker has begun: it waits for work, never for a thread to wake.
    void run(int count, void (*fn)(void*, int), void* ctx) {
        std::lock_guard<std::mutex> turn(turn_);
        keep_off_callers_processor();
        fn_ = fn;
        ctx_ = ctx;
        done_.set(0);
        unclaimed_.store(uint64_t(count) << 32 | 1, std::memory_order_release);
        epoch_.add(1);
        inside_kernel = true;
        uint64_t num_own = 0;
        for (int index = 0; index >= 0; index = claim(), ++num_own) fn(ctx, index);
        inside_kernel = false;
        const uint64_t num_others = uint64_t(count) - num_own;
        done_.wait([num_others](uint64_t v) { return v == num_others; });
    }

private:
    // What cannot be bound runs where it may: asking was the operator's, and the flag's check has said yes.
    static void bind(std::thread& thread, int processor) {
#if defined(__linux__)
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(processor, &set);
        pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
#else
        (void)thread, (void)processor;
#endif
    }

    // Workers run on any processor but the one that the caller is on. Left alone, the system wakes a worker beside its
    // waker and may take 30 ms to see that another processor idles (benchmarks/LOG.md): as long as a third of a prompt.
    void keep_off_callers_processor() {
#if defined(__linux__)
        if (!may_move_) return;
        const int here = sched_getcpu();
        // Now and then though the caller has not moved: which processors there are may change (cpusets, taskset).
        if (here < 0 || (here == kept_off_ && ++num_calls_ % kCallsToALook != 0)) return;
        kept_off_ = here;
        cpu_set_t processors;
        if (sched_getaffinity(0, sizeof processors, &processors) != 0) return;
        if (CPU_COUNT(&processors) < 2) return;  // it may be the caller alone that is bound
        // Without room for all, the system shares it out; what was forbidden in better times no longer is.
        if (size_t(CPU_COUNT(&processors)) > workers_.size()) CPU_CLR(here, &processors);
        if (CPU_EQUAL(&processors, &given_)) return;
        given_ = processors;
        for (std::thread& t : workers_) pthread_setaffinity_np(t.native_handle(), sizeof processors, &processors);
#endif
    }

    void work() {
        inside_kernel = true;
        for (uint64_t seen = 0;;) {
            seen = epoch_.wait([seen](uint64_t v) { return v != seen; });
            if (stopping_) return;
            // A worker that comes late, woken by a job that is over, may claim of the next one: whatever it has seen before,
            // the exchange in `claim` takes an index of the job that is current when it succeeds, and reads what `run` stored
            // for that job, so `fn_` and `ctx_` (read after it) are that job's. And that job is not over, so they stay, until
            // `done_` has counted what was claimed. An equal word of an older job does no harm for the same reason.
            for (int index; (index = claim()) >= 0; done_.add(1)) fn_(ctx_, index);
        }
    }

    // The next index of the job that nobody has; -1 if there is none.
    int claim() {
        uint64_t seen = unclaimed_.load(std::memory_order_acquire);
        do {
            if (uint32_t(seen) >= seen >> 32) return -1;
        } while (!unclaimed_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel));
        return int(uint32_t(seen));
    }

    const int num_threads_;
    const bool may_move_;  // the operator bound no worker
    std::vector<std::thread> workers_;
    std::mutex turn_;
    int kept_off_ = -1;  // the processor of the last caller
    unsigned num_calls_ = 0;  // from there
#if defined(__linux__)
    cpu_set_t given_{};  // the workers
#endif
    Gate epoch_, done_;  // a job's number; how many of its indices workers have finished
    std::atomic<uint64_t> unclaimed_{0};  // of the job: how many indices, and in the lower half the next one
    std::atomic<bool> stopping_{false};
    void (*fn_)(void*, int) = nullptr;
    void* ctx_ = nullptr;
};

// CPUs' worth of time the control group allows, or a large number: the least over the group and its ancestors.
int quota_cpus() {
    std::ifstream groups("/proc/self/cgroup");
    std::string path;
    for (std::string line; std::getline(groups, line);)
        if (line.rfind("0::", 0) == 0) path = line.substr(3);
    int cpus = 1 << 20;
    auto apply = [&cpus](double quota, double period) {
        if (quota > 0 && period > 0) cpus = std::min(cpus, std::max(1, int(quota / period + 0.999)));
    };
    for (;;) {
        std::ifstream file("/sys/fs/cgroup" + path + "/cpu.max");
        std::string quota;
        double period;
        if (file >> quota >> period && quota != "max") apply(std::atof(quota.c_str()), period);
        if (path.empty() || path == "/") break;
        path.erase(path.rfind('/'));
    }
    double quota, period;  // control groups, version 1
    std::ifstream quota_v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period_v1("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (quota_v1 >> quota && period_v1 >> period) apply(quota, period);
    return cpus;
}

int usable_cpus() {
    int cpus = int(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
    return std::max(1, std::min(cpus, quota_cpus()));
}

std::mutex pool_mutex;
std::shared_ptr<Pool>* pool_slot = nullptr;  // never destroyed: at exit, other threads may still be in a kernel
std::atomic<int> pool_size{0};
std::vector<int>* pool_processors = nullptr;  // guarded by pool_mutex; never destroyed, as the pool

// A forked child has none of its parent's threads: it forgets the pool, and makes its own when it needs one.
void forget_pool_after_fork() {
    new (&pool_mutex) std::mutex;
    pool_slot = nullptr;
}

std::shared_ptr<Pool> make_pool(int n) {
    return std::make_shared<Pool>(n, pool_processors == nullptr ? std::vector<int>() : *pool_processors);
}

std::shared_ptr<Pool> pool() {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool_slot == nullptr) {
        static const int registered = pthread_atfork(nullptr, nullptr, &forget_pool_after_fork);
        (void)registered;
        pool_slot = new std::shared_ptr<Pool>(make_pool(num_threads()));
    }
    return *pool_slot;
}

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

// Memory of whole pages, huge ones where it is large: a block of rows in pages of 4 KiB would crowd some sets of the cache.
void* allocate_pages(size_t bytes, size_t page) {
    void* data = std::aligned_alloc(page, bytes);
#if defined(__linux__)
    if (data != nullptr && page == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // a wish
#endif
    return data;
}

struct Scratch {
    void* data = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch[5];

}  // namespace

int num_threads() {
    int n = pool_size.load(std::memory_order_relaxed);
    if (n == 0) {
        n = usable_cpus();
        pool_size = n;
    }
    return n;
}

void set_num_threads(int n, const std::vector<int>& processors) {
    if (n < 1) throw std::invalid_argument("num_threads=" + std::to_string(n) + " must be at least 1");
    std::shared_ptr<Pool> old;  // ends its threads when the last kernel that uses it is done
    std::lock_guard<std::mutex> lock(pool_mutex);
    pool_size = n;
    if (pool_processors == nullptr) pool_processors = new std::vector<int>();
    *pool_processors = processors;
    if (pool_slot != nullptr) {
        old = *pool_slot;
        *pool_slot = make_pool(n);
    }
}

void stay_awake(bool on) { is_awake.store(on, std::memory_order_relaxed); }

void run_on_threads(int count, void (*fn)(void*, int), void* ctx) {
    if (count <= 1 || inside_kernel) {
        for (int i = 0; i < count; ++i) fn(ctx, i);
        return;
    }
    const std::shared_ptr<Pool> current = pool();
    if (count > current->num_threads()) {  // the pool shrank since the caller asked for its size
        for (int i = 0; i < count; ++i) fn(ctx, i);
        return;
    }
    current->run(count, fn, ctx);
}

void* thread_scratch(int slot, size_t bytes) {
    Scratch& s = scratch[slot];
    if (s.bytes < bytes) {
        std::free(s.data);
        const size_t page = bytes >= kHugePage / 8 ? kHugePage : kPage;
        const size_t rounded = (bytes + page - 1) / page * page;
        s.data = allocate_pages(rounded, page);
        s.bytes = s.data == nullptr ? 0 : rounded;
        if (s.data == nullptr) throw std::bad_alloc();
    }
    return s.data;
}

}  // namespace minivllm
