// One pool of threads shared by all kernels. Owns the threads and per-thread scratch; knows nothing of kernels.
//
// Work is split over OUTPUTS only, so how many threads there are, and who runs what, never changes a bit of
// any result. Calls from several Python threads take turns; a call from inside a kernel runs inline.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace minivllm {

int num_threads();            // the calling thread included; by default the CPUs this process may use
// Throws std::invalid_argument when n < 1. Thread i is bound to processors[i % size], but for the calling one (i = 0),
// which is the system's; with none given, workers run where their caller may, but for the processor that it was last on.
void set_num_threads(int n, const std::vector<int>& processors = {});

// While on, threads wait for work (and for each other) awake for up to about a millisecond: for a stretch of calls with
// something else between them. Otherwise for some 30 µs, then they sleep.
void stay_awake(bool on);

// Runs fn(ctx, i) once for each i in [0, count), count <= num_threads(), on as many threads as are there to take one;
// returns when all are done. fn must not throw.
void run_on_threads(int count, void (*fn)(void* ctx, int index), void* ctx);

// This thread's scratch memory: at least `bytes`, 64-byte aligned, contents undefined. It stays valid until the
// next call with the same slot on the same thread; it grows and is kept, so a steady state allocates nothing.
// Slot 0 is for what is prepared before the work itself, by the caller for all threads or by each for itself; 1 to 4 are for
// inside.
void* thread_scratch(int slot, size_t bytes);

// Splits [0, n) into at most num_threads() ranges of at least `grain` (the last excepted), and calls
// fn(begin, end) for each. For work whose items cost the same.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& fn) {
    if (n <= 0) return;
    const int64_t wanted = (n + grain - 1) / grain;
    const int parts = wanted < num_threads() ? int(wanted) : num_threads();
    if (parts <= 1) return fn(int64_t(0), n);
    struct Context { const F& fn; int64_t n; int parts; } context{fn, n, parts};
    run_on_threads(parts, [](void* p, int i) {
        const Context& c = *static_cast<Context*>(p);
        c.fn(c.n * i / c.parts, c.n * (i + 1) / c.parts);
    }, &context);
}

// Splits [0, n) into a share for each thread, and calls fn(own, begin, end, share_end) for pieces of it, in ascending order,
// `own` being what prepare() gave that thread before its first piece; a thread that is done takes pieces of the others'
// shares. For work that goes best in order, but is worth sharing out anew when a thread is held up.
template <class P, class F>
void parallel_shares(int64_t n, int64_t piece, const P& prepare, const F& fn) {
    constexpr int kMostShares = 256;
    if (n <= 0) return;
    const int64_t pieces = (n + piece - 1) / piece;
    int parts = num_threads() < kMostShares ? num_threads() : kMostShares;
    if (pieces < parts) parts = int(pieces);
    if (parts <= 1) return fn(prepare(), int64_t(0), n, n);
    struct alignas(64) Share { std::atomic<int64_t> next; int64_t end; } shares[kMostShares];
    for (int i = 0; i < parts; ++i) {
        shares[i].next.store(n * i / parts, std::memory_order_relaxed);
        shares[i].end = n * (i + 1) / parts;
    }
    struct Context { const P& prepare; const F& fn; Share* shares; int parts; int64_t piece; };
    Context context{prepare, fn, shares, parts, piece};
    run_on_threads(parts, [](void* p, int index) {
        Context& c = *static_cast<Context*>(p);
        int64_t left = 0;  // a thread that comes late prepares nothing
        for (int i = 0; i < c.parts; ++i) left += c.shares[i].next.load(std::memory_order_relaxed) < c.shares[i].end;
        if (left == 0) return;
        const auto own = c.prepare();
        for (int i = 0; i < c.parts; ++i) {
            Share& share = c.shares[(index + i) % c.parts];
            for (int64_t b; (b = share.next.fetch_add(c.piece, std::memory_order_relaxed)) < share.end;)
                c.fn(own, b, b + c.piece < share.end ? b + c.piece : share.end, share.end);
        }
    }, &context);
}

// Calls fn(i) for each i in [0, n); a thread that is done takes the next. For work whose items differ in cost.
template <class F>
void parallel_tasks(int64_t n, const F& fn) {
    if (n <= 0) return;
    const int parts = n < num_threads() ? int(n) : num_threads();
    struct Context { const F& fn; int64_t n; std::atomic<int64_t> next; } context{fn, n, {0}};
    run_on_threads(parts, [](void* p, int) {
        Context& c = *static_cast<Context*>(p);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) c.fn(i);
    }, &context);
}

}  // namespace minivllm
