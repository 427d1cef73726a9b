#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>

#include "float_env.h"

namespace elinvar {
namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Long enough for the Python between two ops, short enough to leave an idle machine alone.
constexpr auto kSpin = std::chrono::microseconds(200);

template <class Done>
bool spin_until(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

}  // namespace

std::vector<int> usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof(set), &set) == 0)
        for (int c = 0; c < CPU_SETSIZE; ++c)
            if (CPU_ISSET(c, &set)) cpus.push_back(c);
    if (cpus.empty()) cpus.push_back(0);
    return cpus;
}

Pool::Pool(int num_threads) {
    try {
        start(num_threads);
    } catch (...) {  // the system has no more threads: those that began must not outlive the pool
        stop();
        throw;
    }
}

void Pool::start(int num_threads) {
    const std::vector<int> cpus = usable_cpus();
    for (int t = 1; t < num_threads; ++t) {
        threads_.emplace_back([this, t] { work(t); });
        if (num_threads <= static_cast<int>(cpus.size())) {
            // The caller, a Python thread, stays free; workers take the CPUs from the far end.
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpus[cpus.size() - static_cast<size_t>(t)], &set);
            pthread_setaffinity_np(threads_.back().native_handle(), sizeof(set), &set);
        }
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stop_.store(true);
    wake_.fetch_add(1);
    wake_.notify_all();
    for (auto& t : threads_) t.join();
}

void Pool::take(int thread) {
    uint64_t s = state_.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(s) != 0) {
        if (!state_.compare_exchange_weak(s, s - 1, std::memory_order_acq_rel)) continue;
        call_(body_, static_cast<int>(static_cast<uint32_t>(s)) - 1, thread);
        if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
        s = state_.load(std::memory_order_acquire);
    }
}

void Pool::work(int thread) {
    const DefaultFloatMode mode;
    while (true) {
        const uint32_t seen = wake_.load(std::memory_order_acquire);
        if (!spin_until([&] { return has_items() || stop_.load(std::memory_order_relaxed); })) {
            sleepers_.fetch_add(1);
            if (!has_items()) wake_.wait(seen);
            sleepers_.fetch_sub(1);
        }
        if (stop_.load()) return;
        take(thread);
    }
}

void Pool::run_erased(int count, Call call, const void* body) {
    const std::lock_guard<std::mutex> lock(busy_);
    call_ = call;
    body_ = body;
    pending_.store(count, std::memory_order_relaxed);
    const uint64_t region = (state_.load(std::memory_order_relaxed) >> 32) + 1;
    state_.store(region << 32 | static_cast<uint32_t>(count));
    if (sleepers_.load() > 0) {
        wake_.fetch_add(1);
        wake_.notify_all();
    }
    take(0);
    const auto done = [&] { return pending_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(done)) {
        const int left = pending_.load(std::memory_order_acquire);
        if (left) pending_.wait(left);
    }
}

}  // namespace elinvar
