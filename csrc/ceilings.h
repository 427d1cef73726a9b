// What this machine reaches at most, with loops that do nothing else: the roof of a roofline.
#pragma once

#include <cstddef>
#include <string>

namespace elinvar {

// Bytes a second, and operations a second (a multiply-add counts two), over all threads.
// 0: the instruction set has no such instruction.
struct Ceilings {
    std::size_t cache_bytes = 0;  // of the last cache
    double read = 0;              // from memory: a set several times the last cache
    double read_cached = 0;       // a set that the last cache holds and the ones before it do not
    double fma = 0;               // f32
    double maddubs = 0;           // 8 bit times 8 bit, pairs added up in 16 bits
    double dot = 0;               // 8 bit times 8 bit, fours added up in 32 bits (vpdpbusd, sdot)
};

// Takes about a second. `simd` as Provider takes it, but not empty.
Ceilings measure_ceilings(int num_threads, const std::string& simd);

}  // namespace elinvar
