// Pseudo-random inputs, the same everywhere, for programs that run the kernels without Python.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "provider.h"

namespace elinvar {

inline uint64_t state = 88172645463325252ULL;
inline uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
}
inline float uniform() { return static_cast<float>(next() >> 8) * 0x1p-23f - 1.0f; }
inline std::vector<float> floats(std::size_t n, float scale = 1.0f) {
    std::vector<float> v(n);
    for (float& x : v) x = uniform() * scale;
    return v;
}

inline std::vector<uint8_t> packed(Kind kind, int n, int k) {
    const std::size_t panel = panel_bytes(kind, k);
    std::vector<uint8_t> bytes(panel * static_cast<std::size_t>((n + 15) / 16));
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        const std::size_t at = i % panel;
        uint32_t r = next();
        if (kind <= Kind::q8) {
            if (static_cast<int>(at) % group_bytes(kind) < code_bytes(kind))
                bytes[i] = static_cast<uint8_t>(kind == Kind::q8 && (r & 255) == 128 ? 0 : r);
            else  // f16 between 2^-6 and 2^-4, either sign
                bytes[i] = static_cast<uint8_t>(at % 2 ? 0x24 | (r & 0x87) : r);
        } else if (kind == Kind::f32) {
            const float f = uniform();
            std::memcpy(&r, &f, 4);
            bytes[i] = static_cast<uint8_t>(r >> 8 * (at % 4));
            if (at % 4 == 3) bytes[i] = static_cast<uint8_t>(0x3c | (bytes[i] & 0x80));
        } else {
            bytes[i] = static_cast<uint8_t>(at % 2 ? 0x3a | (r & 0x81) : r);
        }
    }
    return bytes;
}

}  // namespace elinvar
