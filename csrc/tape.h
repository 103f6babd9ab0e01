// Native calls written down with their arguments, to be made again in one go, without Python: a CUDA graph for a CPU.
//
// Owns copies of the arguments, nothing that they point to: see minivllm/ops/recording.py. Of tapes of the same calls
// at some sizes one is made that serves all sizes. A thread records onto one tape at a time; what else it calls meanwhile
// happens, and is not on the tape.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace minivllm {

template <class T>
inline constexpr bool may_be_size = std::is_same_v<T, int64_t>;
template <size_t N>
inline constexpr bool may_be_size<std::array<int64_t, N>> = true;

class Call {
public:
    explicit Call(const char* name) : name(name) {}
    virtual ~Call() = default;

    virtual void make() const = 0;
    // Its arguments that may be sizes: all int64_t, alone and in arrays. (An address is a uintptr_t.)
    virtual std::vector<int64_t*> integers() = 0;
    // Whether they are the same call, these integers aside.
    virtual bool is_like(const Call& other) const = 0;

    const char* const name;
};

template <class F, class... Args>
class CallOf final : public Call {
public:
    CallOf(const char* name, F f, Args... args) : Call(name), f_(std::move(f)), args_(std::move(args)...) {}

    void make() const override { std::apply(f_, args_); }

    std::vector<int64_t*> integers() override {
        std::vector<int64_t*> found;
        std::apply([&](Args&... args) { (add_integers(found, args), ...); }, args_);
        return found;
    }

    bool is_like(const Call& other) const override {
        const auto* same = dynamic_cast<const CallOf*>(&other);
        return same != nullptr && std::string(name) == same->name && are_like(*same, std::index_sequence_for<Args...>());
    }

private:
    template <class T>
    static void add_integers(std::vector<int64_t*>& found, T& arg) {
        if constexpr (std::is_same_v<T, int64_t>)
            found.push_back(&arg);
        else if constexpr (may_be_size<T>)
            for (int64_t& each : arg) found.push_back(&each);
    }

    template <size_t I>
    bool is_like_at(const CallOf& other) const {
        if constexpr (may_be_size<std::tuple_element_t<I, std::tuple<Args...>>>)
            return true;
        else
            return std::get<I>(args_) == std::get<I>(other.args_);
    }
    template <size_t... I>
    bool are_like(const CallOf& other, std::index_sequence<I...>) const {
        return (is_like_at<I>(other) && ...);
    }

    F f_;
    std::tuple<Args...> args_;
};

class Tape {
public:
    using Sizes = std::vector<int64_t>;

    // is_dry: calls are written down and not made; after: a tape whose calls, at the same sizes, come first in a replay.
    explicit Tape(bool is_dry, Tape* after) : is_dry(is_dry), after_(after) {}
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

    void add(std::unique_ptr<Call> call) { calls_.push_back(std::move(call)); }
    size_t size() const { return calls_.size(); }

    std::vector<std::string> names() const {
        std::vector<std::string> names;
        for (const auto& call : calls_) names.push_back(call->name);
        return names;
    }

    // Has the tape serve any sizes. `others` hold the same calls, on the same memory, of steps of other sizes: an integer
    // that differs is the same multiple of the same size in all. Ratios of a size to what it is in the first of the others
    // must differ from size to size, so that it is known which one; a second excludes coincidences. Throws
    // std::invalid_argument where the tapes differ in anything else.
    void follow_sizes(const std::vector<const Tape*>& others, const Sizes& own, const std::vector<Sizes>& theirs) {
        for (const Tape* other : others)
            if (calls_.size() != other->calls_.size())
                throw std::invalid_argument(std::to_string(calls_.size()) + " calls at one size, " +
                                            std::to_string(other->calls_.size()) + " at another");
        std::vector<Follower> followers;
        for (size_t i = 0; i < calls_.size(); ++i) {
            std::vector<std::vector<int64_t*>> same;  // integers, of each of the others
            for (const Tape* other : others) {
                if (!calls_[i]->is_like(*other->calls_[i]))
                    throw std::invalid_argument("call " + std::to_string(i) + ", " + calls_[i]->name +
                                                ", differs from one size to another in more than integers");
                same.push_back(other->calls_[i]->integers());
            }
            const std::vector<int64_t*> integers = calls_[i]->integers();
            for (size_t j = 0; j < integers.size(); ++j) {
                Sizes values;
                for (const auto& each : same) values.push_back(*each[j]);
                if (values != Sizes(values.size(), *integers[j]))
                    followers.push_back(follower(*calls_[i], integers[j], values, own, theirs));
            }
        }
        followers_ = std::move(followers);
        num_sizes_ = own.size();
    }

    // Makes the calls again, in order; `sizes` as in follow_sizes, none without it. Throws what one of them throws; those
    // behind it are not made then.
    void replay(const Sizes& sizes) {
        if (sizes.size() != num_sizes_)
            throw std::invalid_argument(std::to_string(sizes.size()) + " sizes for a tape of " +
                                        std::to_string(num_sizes_));
        if (after_ != nullptr) after_->replay(sizes);
        for (const Follower& each : followers_) *each.place = each.factor * sizes[each.size];
        for (const auto& call : calls_) call->make();
    }

    // The last replay once more, of this tape alone; nanoseconds of each call.
    std::vector<int64_t> timed_replay() const {
        std::vector<int64_t> took;
        took.reserve(calls_.size());
        auto begin = std::chrono::steady_clock::now();
        for (const auto& call : calls_) {
            call->make();
            const auto end = std::chrono::steady_clock::now();
            took.push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count());
            begin = end;
        }
        return took;
    }

    const bool is_dry;

private:
    // An integer of a call that is `factor` times a size.
    struct Follower {
        int64_t* place;
        int64_t factor;
        size_t size;
    };

    // values: what an integer is at each of `theirs`.
    static Follower follower(const Call& call, int64_t* integer, const Sizes& values, const Sizes& own,
                             const std::vector<Sizes>& theirs) {
        for (size_t s = 0; s < own.size(); ++s) {
            if (own[s] == 0 || *integer % own[s] != 0) continue;
            const int64_t factor = *integer / own[s];
            bool follows = true;
            for (size_t k = 0; k < values.size(); ++k) follows = follows && factor * theirs[k][s] == values[k];
            if (follows) return {integer, factor, s};
        }
        std::string found = std::to_string(*integer) + " at one size";
        for (const int64_t value : values) found += ", " + std::to_string(value) + " at another";
        throw std::invalid_argument(std::string(call.name) + " is given " + found + ", which are no multiple of any");
    }

    Tape* const after_;
    static inline thread_local Tape* current = nullptr;
    std::vector<std::unique_ptr<Call>> calls_;
    std::vector<Follower> followers_;
    size_t num_sizes_ = 0;
};

}  // namespace minivllm
