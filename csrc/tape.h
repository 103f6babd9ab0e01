// Native calls written down with their arguments, to be made again in one go, without Python: a CUDA graph for a CPU.
//
// Owns copies of the arguments, nothing that they point to: see minivllm/ops/recording.py. A thread records onto one
// tape at a time; what else it calls meanwhile happens, and is not on the tape.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace minivllm {

class Tape {
public:
    Tape() = default;
    Tape(const Tape&) = delete;
    Tape& operator=(const Tape&) = delete;
    ~Tape() { stop(); }

    // The tape that this thread records onto, or null.
    static Tape* recording() { return current; }

    void start() {
        if (current != nullptr) throw std::logic_error("this thread records another tape");
        current = this;
    }
    void stop() {
        if (current == this) current = nullptr;
    }

    void add(const char* name, std::function<void()> call) { calls_.push_back({name, std::move(call)}); }
    size_t size() const { return calls_.size(); }

    std::vector<std::string> names() const {
        std::vector<std::string> names;
        for (const Call& call : calls_) names.push_back(call.name);
        return names;
    }

    // Makes the calls again, in order. Throws what one of them throws; those behind it are not made then.
    void replay() const {
        for (const Call& call : calls_) call.make();
    }

    // As replay; nanoseconds of each call.
    std::vector<int64_t> timed_replay() const {
        std::vector<int64_t> took;
        took.reserve(calls_.size());
        auto begin = std::chrono::steady_clock::now();
        for (const Call& call : calls_) {
            call.make();
            const auto end = std::chrono::steady_clock::now();
            took.push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count());
            begin = end;
        }
        return took;
    }

private:
    struct Call {
        const char* name;
        std::function<void()> make;
    };

    static inline thread_local Tape* current = nullptr;
    std::vector<Call> calls_;
};

}  // namespace minivllm
