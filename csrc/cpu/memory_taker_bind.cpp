// Has the system give the memory of fresh buffers while others use them already: pages come zeroed, and a page that is
// there, written or not, is left as it is.
#include <cerrno>
#include <cstring>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "../bindings.h"

namespace minivllm {
namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kStep = 2 << 20;  // at a time: a huge page
#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

// 0, or why not. Only the system's own way is safe beside writers: writing back what was read would undo what somebody
// wrote between.
int populate(uintptr_t address, uintptr_t bytes) {
#if defined(__linux__)
    while (madvise(reinterpret_cast<void*>(address), bytes, MADV_POPULATE_WRITE) != 0)
        if (errno != EINTR && errno != EAGAIN) return errno;
    return 0;
#else
    (void)address, (void)bytes;
    return ENOSYS;
#endif
}

class MemoryTaker {
public:
    using Buffer = std::pair<uintptr_t, uintptr_t>;  // address, bytes

    // Takes the first pages of all buffers, then the next: blocks are handed out from the lowest on. Throws
    // std::runtime_error where the system cannot; then nothing runs.
    explicit MemoryTaker(const std::vector<Buffer>& buffers) {
        for (auto [address, bytes] : buffers) {
            const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
            if (begin < end) buffers_.emplace_back(begin, end - begin);
        }
        if (buffers_.empty()) return;
        if (const int error = populate(buffers_[0].first, kPage))
            throw std::runtime_error(std::string("MADV_POPULATE_WRITE: ") + std::strerror(error));
        thread_ = std::thread([this] { run(); });
    }
    ~MemoryTaker() { stop(); }

    // While on, it begins with no further page. Returns at once: the page in hand may take a little longer.
    void hold(bool on) {
        std::lock_guard<std::mutex> lock(mutex_);
        is_held_ = on;
        if (!on) may_go_on_.notify_all();
    }
    // The buffers may go away after this. May be called again.
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_stopping_ = true;
            may_go_on_.notify_all();
        }
        wait();
    }
    void wait() {
        if (thread_.joinable()) thread_.join();
    }

private:
    void run() {
#if defined(__linux__)
        const sched_param none{};
        pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);  // a wish; it holds no lock that others wait for long
#endif
        uintptr_t longest = 0;
        for (auto [address, bytes] : buffers_) longest = std::max(longest, bytes);
        for (uintptr_t offset = 0; offset < longest; offset += kStep)
            for (auto [address, bytes] : buffers_) {
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    may_go_on_.wait(lock, [this] { return is_stopping_ || !is_held_; });
                    if (is_stopping_) return;
                }
                // What the system cannot give now, it is asked for again by whoever writes it.
                if (offset < bytes) populate(address + offset, std::min(kStep, bytes - offset));
            }
    }

    std::vector<Buffer> buffers_;
    std::mutex mutex_;
    std::condition_variable may_go_on_;
    bool is_stopping_ = false, is_held_ = false;
    std::thread thread_;
};

}  // namespace

MINIVLLM_BIND(memory_taker, m) {
    nb::class_<MemoryTaker>(m, "MemoryTaker")
        .def("__init__",
             [](MemoryTaker* self, const std::vector<uintptr_t>& addresses, const std::vector<uintptr_t>& sizes) {
                 if (addresses.size() != sizes.size())
                     throw std::invalid_argument("as many addresses as sizes are needed");
                 std::vector<MemoryTaker::Buffer> buffers;
                 for (size_t i = 0; i < sizes.size(); ++i) buffers.emplace_back(addresses[i], sizes[i]);
                 new (self) MemoryTaker(buffers);
             })
        .def("hold", &MemoryTaker::hold, nb::arg("on"))
        .def("stop", &MemoryTaker::stop, release_gil)
        .def("wait", &MemoryTaker::wait, release_gil);
}

}  // namespace minivllm
