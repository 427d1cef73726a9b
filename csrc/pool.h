// A pool of pinned threads. run() splits independent items; idle threads spin briefly for the
// next op of the same step, then sleep (pure spinning collapses when cores are oversubscribed).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace elinvar {

class Pool {
  public:
    explicit Pool(int num_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return static_cast<int>(threads_.size()) + 1; }

    // Calls body(item, thread) for each item in 0..count-1 and returns when all are done. Items
    // are claimed by whoever is free; the caller works too.
    template <class Body>
    void run(int count, const Body& body) {
        if (count <= 0) return;
        if (count == 1 || threads_.empty()) {
            for (int i = 0; i < count; ++i) body(i, 0);
            return;
        }
        run_erased(
            count, [](const void* b, int i, int t) { (*static_cast<const Body*>(b))(i, t); },
            &body);
    }

  private:
    using Call = void (*)(const void*, int, int);
    void run_erased(int count, Call call, const void* body);
    void work(int thread);
    void start(int num_threads);
    void stop();
    void take(int thread);
    bool has_items() const { return static_cast<uint32_t>(state_.load()) != 0; }

    std::vector<std::thread> threads_;
    std::mutex busy_;  // one region at a time
    Call call_ = nullptr;
    const void* body_ = nullptr;
    // Region number above, unclaimed items below. A claim holds its region open (pending_), so a
    // thread that wakes late can neither take an item of a past region nor delay the present one.
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
};

// CPUs this process may run on.
std::vector<int> usable_cpus();

}  // namespace elinvar
