// The floating-point mode of the thread that runs an op. Any library built with -ffast-math (and
// torch.set_flush_denormal) leaves its thread flushing denormals; threads inherit the mode. An op's
// bits may not depend on that: it runs in the default mode and restores the caller's.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace elinvar {

class DefaultFloatMode {
  public:
#if defined(__x86_64__)
    DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultFloatMode() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    DefaultFloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~DefaultFloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
    DefaultFloatMode() : saved_(0) {}
    ~DefaultFloatMode() { static_cast<void>(saved_); }
#endif
    DefaultFloatMode(const DefaultFloatMode&) = delete;
    DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

  private:
#if defined(__x86_64__)
    unsigned saved_;
#else
    uint64_t saved_;
#endif
};

}  // namespace elinvar
