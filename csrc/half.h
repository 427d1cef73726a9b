// f16 and bf16 to f32 without vector instructions, for the code that every machine runs. simd.h has
// its own: an inline function compiled for a wide machine must not be linked in here.
#pragma once

#include <cstdint>
#include <cstring>

namespace elinvar {

inline float float_of_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float bf16_value(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }
inline float half_value(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

}  // namespace elinvar
