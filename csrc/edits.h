// What is done to logits before one of them is chosen: ops/arguments.py says what each means.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace elinvar {

// Each part may be absent: then its first pointer is null. Rows are those that sample.
struct SampleEdits {
    const float* typical_p = nullptr;  // [rows]

    const int32_t* history_starts = nullptr;  // [rows + 1] into history
    const int32_t *history = nullptr, *prompt_lens = nullptr;
    const float *repetition = nullptr, *presence = nullptr, *frequency = nullptr;  // [rows]

    const int32_t* bias_starts = nullptr;  // [rows + 1] into the two that follow
    const int32_t* bias_ids = nullptr;
    const float* biases = nullptr;

    const int32_t* mask_rows = nullptr;  // [num_masks]
    const uint32_t* masks = nullptr;     // [num_masks, words of 32 tokens]
    int num_masks = 0;

    // Whether the logits of this row change.
    bool touch(int row) const;
    bool is_typical(int row) const { return typical_p != nullptr && typical_p[row] < 1; }
    // out = the row's logits as they are to be chosen from: finite, or -inf where a token may not
    // be chosen; and their peak. `seen` is room for as many floats.
    Peak apply(const Kernels& k, int row, const float* logits, int vocab, float* out,
               float* seen) const;

  private:
    void penalise(int row, int vocab, float* x, float* seen) const;
    // Adds biases; forbids by them what they forbid, unless `lenient`.
    void bias(int row, int vocab, float* x, bool lenient) const;
    void mask(const Kernels& k, int row, int vocab, float* x) const;
};

// NaN becomes the lowest float.
inline float finite(float x) {
    constexpr float most = 3.402823466e38f;
    const float at_least = x > -most ? x : -most;
    return at_least < most ? at_least : most;
}

}  // namespace elinvar
