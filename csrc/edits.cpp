// Without sums: each element's arithmetic is that of its own line on every machine.
#include "edits.h"

#include <algorithm>
#include <limits>

namespace elinvar {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

}  // namespace

bool SampleEdits::touch(int row) const {
    if (history_starts != nullptr && history_starts[row] < history_starts[row + 1]) return true;
    if (bias_starts != nullptr && bias_starts[row] < bias_starts[row + 1]) return true;
    return std::find(mask_rows, mask_rows + num_masks, row) != mask_rows + num_masks;
}

Peak SampleEdits::apply(const Kernels& k, int row, const float* logits, int vocab, float* out,
                        float* seen) const {
    for (bool lenient = false;; lenient = true) {
        k.finite_row(logits, vocab, out);
        penalise(row, vocab, out, seen);
        bias(row, vocab, out, lenient);
        mask(k, row, vocab, out);
        // Where nothing would be left, the mask has the last word.
        const Peak peak = k.peak(out, vocab);
        if (lenient || peak.max != kForbidden) return peak;
    }
}

void SampleEdits::penalise(int row, int vocab, float* x, float* seen) const {
    if (history_starts == nullptr || history_starts[row] == history_starts[row + 1]) return;
    const int32_t *begin = history + history_starts[row], *end = history + history_starts[row + 1];
    const int32_t* answer = begin + prompt_lens[row];
    std::fill(seen, seen + vocab, 0.0f);
    const float factor = repetition[row];
    for (const int32_t* id = begin; id < end; ++id) {
        if (seen[*id] != 0) continue;
        seen[*id] = 1;
        x[*id] = finite(x[*id] > 0 ? x[*id] / factor : x[*id] * factor);
    }
    for (const int32_t* id = answer; id < end; ++id) seen[*id] += 1;  // 1 + the count
    for (const int32_t* id = answer; id < end; ++id) {
        if (seen[*id] == 0) continue;
        const float count = seen[*id] - 1;
        seen[*id] = 0;
        x[*id] = finite((x[*id] - frequency[row] * count) - presence[row]);
    }
}

void SampleEdits::bias(int row, int vocab, float* x, bool lenient) const {
    if (bias_starts == nullptr) return;
    for (int32_t i = bias_starts[row]; i < bias_starts[row + 1]; ++i) {
        if (bias_ids[i] >= vocab) continue;
        float& logit = x[bias_ids[i]];
        if (biases[i] != kForbidden)
            logit = logit == kForbidden ? logit : finite(logit + biases[i]);
        else if (!lenient)
            logit = kForbidden;
    }
}

void SampleEdits::mask(const Kernels& k, int row, int vocab, float* x) const {
    const int words = (vocab + 31) / 32;
    for (int m = 0; m < num_masks; ++m)
        if (mask_rows[m] == row) k.mask_row(masks + std::ptrdiff_t{m} * words, vocab, x);
}

}  // namespace elinvar
