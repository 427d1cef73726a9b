// The loops that measure a machine's ceilings. Operands stay in registers and enough chains run
// side by side to hide each instruction's latency. A function names its own instruction set: this
// file is compiled once, as it shares nothing with the kernels.
#include "ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define EL_UNROLL _Pragma("unroll")
#else
#define EL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace elinvar {
namespace {

constexpr int kSteps = 4000;
constexpr std::size_t kLargePage = 2 << 20;

struct Loops {
    void (*read)(const uint8_t* p, std::size_t bytes);
    void (*fma)();
    double fma_ops;  // of one call
    void (*maddubs)();
    double maddubs_ops;
    void (*dot)();
    double dot_ops;
};

// Volatile assembly, so that the optimiser neither merges equal chains nor leaves one out.
#if defined(__x86_64__)

#define EL_AVX2 __attribute__((target("avx2,fma")))
#define EL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define EL_ACCUMULATE(op, sum, a, b) asm volatile(op " %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#define EL_COMPUTE(op, to, a, b) asm volatile(op " %2, %1, %0" : "=v"(to) : "v"(a), "v"(b))

EL_AVX2 void read_avx2(const uint8_t* p, std::size_t bytes) {
    __m256i sum[4] = {};
    for (std::size_t i = 0; i < bytes; i += 128) {
        EL_UNROLL
        for (int j = 0; j < 4; ++j) {
            const auto* at = reinterpret_cast<const __m256i*>(p + i + 32 * j);
            sum[j] = _mm256_or_si256(sum[j], _mm256_load_si256(at));
        }
    }
    for (auto& s : sum) asm volatile("" : : "v"(s));
}
EL_AVX2 void fma_avx2() {
    __m256 x = _mm256_set1_ps(0.5f), sum[12] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 12; ++i) EL_ACCUMULATE("vfmadd231ps", sum[i], x, x);
    }
}
EL_AVX2 void maddubs_avx2() {
    __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5), sum[12] = {}, pairs;
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 12; ++i) {
            EL_COMPUTE("vpmaddubsw", pairs, w, x);
            EL_COMPUTE("vpaddw", sum[i], sum[i], pairs);
        }
    }
}
constexpr Loops kAvx2{read_avx2, fma_avx2, kSteps * 12 * 16.0, maddubs_avx2, kSteps * 12 * 64.0,
                      nullptr,   0};

EL_AVX512 void read_avx512(const uint8_t* p, std::size_t bytes) {
    __m512i sum[4] = {};
    for (std::size_t i = 0; i < bytes; i += 256) {
        EL_UNROLL
        for (int j = 0; j < 4; ++j)
            sum[j] = _mm512_or_si512(sum[j], _mm512_load_si512(p + i + 64 * j));
    }
    for (auto& s : sum) asm volatile("" : : "v"(s));
}
EL_AVX512 void fma_avx512() {
    __m512 x = _mm512_set1_ps(0.5f), sum[16] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 16; ++i) EL_ACCUMULATE("vfmadd231ps", sum[i], x, x);
    }
}
EL_AVX512 void maddubs_avx512() {
    __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5), sum[16] = {}, pairs;
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 16; ++i) {
            EL_COMPUTE("vpmaddubsw", pairs, w, x);
            EL_COMPUTE("vpaddw", sum[i], sum[i], pairs);
        }
    }
}
EL_AVX512 void dot_avx512() {
    __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5), sum[16] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 16; ++i) EL_ACCUMULATE("vpdpbusd", sum[i], w, x);
    }
}
constexpr Loops kAvx512{read_avx512,         fma_avx512, kSteps * 16 * 32.0, maddubs_avx512,
                        kSteps * 16 * 128.0, dot_avx512, kSteps * 16 * 128.0};

#elif defined(__aarch64__)

void read_neon(const uint8_t* p, std::size_t bytes) {
    uint8x16_t sum[4] = {};
    for (std::size_t i = 0; i < bytes; i += 64) {
        EL_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] = vorrq_u8(sum[j], vld1q_u8(p + i + 16 * j));
    }
    for (auto& s : sum) asm volatile("" : : "w"(s));
}
void fma_neon() {
    float32x4_t x = vdupq_n_f32(0.5f), sum[16] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 16; ++i)
            asm volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(sum[i]) : "w"(x));
    }
}
void dot_neon() {
    int8x16_t x = vdupq_n_s8(5);
    int32x4_t sum[16] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 16; ++i)
            asm volatile(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %1.16b"
                         : "+w"(sum[i])
                         : "w"(x));
    }
}
constexpr Loops kNeon{read_neon, fma_neon, kSteps * 16 * 8.0, nullptr,
                      0,         dot_neon, kSteps * 16 * 32.0};

#endif

void read_scalar(const uint8_t* p, std::size_t bytes) {
    uint64_t sum[4] = {};
    const auto* words = reinterpret_cast<const uint64_t*>(p);
    for (std::size_t i = 0; i < bytes / 8; i += 4) {
        EL_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] |= words[i + static_cast<std::size_t>(j)];
    }
    for (auto& s : sum) asm volatile("" : : "r"(s));
}
void fma_scalar() {
    float x = 0.5f, sum[8] = {};
    for (int step = 0; step < kSteps; ++step) {
        EL_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum[i] = __builtin_fmaf(x, x, sum[i]);
            asm volatile("" : "+m"(sum[i]));
        }
    }
}
constexpr Loops kScalar{read_scalar, fma_scalar, kSteps * 8 * 2.0, nullptr, 0, nullptr, 0};

const Loops& loops_of(const std::string& simd) {
#if defined(__x86_64__)
    if (simd == "avx512") return kAvx512;
    if (simd == "avx2") return kAvx2;
#elif defined(__aarch64__)
    if (simd == "neon") return kNeon;
#endif
    return kScalar;
}

// Work a second of `calls` calls, shared among the threads. The best of a few rounds counts, as
// what disturbs a machine only makes it slower.
template <class Call>
double best_rate(Pool& pool, int rounds, int calls, double work, const Call& call) {
    double best = 0;
    for (int round = 0; round < rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        pool.run(calls, [&](int i, int) { call(i); });
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::max(best, work * calls / taken.count());
    }
    return best;
}

double compute_rate(Pool& pool, void (*loop)(), double ops) {
    return loop ? best_rate(pool, 4, 32 * pool.size(), ops, [&](int) { loop(); }) : 0;
}

class ReadSet {
  public:
    ReadSet(std::size_t bytes, int chunks)
        : chunks_(chunks),
          chunk_(bytes / static_cast<std::size_t>(chunks) / 4096 * 4096),
          data_(std::aligned_alloc(kLargePage, (bytes + kLargePage - 1) / kLargePage * kLargePage),
                std::free) {
        if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
        std::memset(data_.get(), 1, bytes);
    }

    double rate(Pool& pool, const Loops& loops, int rounds) const {
        const auto* first = static_cast<const uint8_t*>(data_.get());
        return best_rate(pool, rounds, chunks_, static_cast<double>(chunk_), [&](int i) {
            loops.read(first + static_cast<std::size_t>(i) * chunk_, chunk_);
        });
    }

  private:
    int chunks_;
    std::size_t chunk_;
    std::unique_ptr<void, void (*)(void*)> data_;
};

// From the kernel: sysconf(_SC_LEVEL3_CACHE_SIZE) adds up the caches of all sockets on some CPUs.
std::size_t last_cache_bytes() {
    std::size_t largest = 0;
    for (int index = 0; index < 8; ++index) {
        std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                           "/size");
        std::size_t size = 0;
        char unit = 0;
        if (file >> size >> unit) largest = std::max(largest, size << (unit == 'M' ? 20 : 10));
    }
    return largest ? largest : std::size_t{8} << 20;
}

}  // namespace

Ceilings measure_ceilings(int num_threads, const std::string& simd) {
    const Loops& loops = loops_of(simd);
    Pool pool(num_threads);
    const std::size_t cache = last_cache_bytes();
    const ReadSet cached(cache / 2, 8 * num_threads);
    // A cache beyond that size is shared with others and holds no model of ours.
    const ReadSet memory(std::min(4 * cache, std::size_t{512} << 20), 8 * num_threads);
    Ceilings found;
    found.cache_bytes = cache;
    // Everything in turn, several times: a neighbour who comes by must not hide one of them.
    for (int pass = 0; pass < 24; ++pass) {
        const auto keep = [](double& best, double rate) { best = std::max(best, rate); };
        keep(found.fma, compute_rate(pool, loops.fma, loops.fma_ops));
        keep(found.maddubs, compute_rate(pool, loops.maddubs, loops.maddubs_ops));
        keep(found.dot, compute_rate(pool, loops.dot, loops.dot_ops));
        keep(found.read_cached, cached.rate(pool, loops, 12));
        keep(found.read, memory.rate(pool, loops, 8));
    }
    return found;
}

}  // namespace elinvar
