// Ops of layers with a recurrent state. A state belongs to one sequence, so items are sequences
// times channels: a long prompt and a single token alike make work for all threads.
#include <algorithm>

#include "provider.h"

namespace elinvar {

StateSpan StateTables::span(int i) const {
    const int first = query_start[i], count = query_start[i + 1] - first;
    const int32_t* table = tables + i * stride;
    const int end = seq_lens[i], begin = end - count;
    return {first, count, begin ? table[(begin - 1) / 32] : -1, table[(end - 1) / 32]};
}

void Provider::causal_conv(const Convolution& a, const StateTables& t) {
    // A token's channels lie together, the next token's far away.
    const int wanted = 2 * pool_.size() / std::max(1, t.num_seqs) + 1;
    const int width = std::clamp((a.channels / wanted + 15) / 16 * 16, 64, 2048);
    const int across = (a.channels + width - 1) / width;
    pool_.run(t.num_seqs * across, [&](int i, int) {
        const int first = i % across * width;
        kernels_->causal_conv(a, t.span(i / across), first, std::min(width, a.channels - first));
    });
}

void Provider::delta_rule(const DeltaRule& a, const StateTables& t) {
    const int width = 64, across = (a.value_dim + width - 1) / width, items = a.heads * across;
    pool_.run(t.num_seqs * items, [&](int i, int) {
        const int first = i % across * width;
        kernels_->delta_rule(a, t.span(i / items), i % items / across, first,
                             std::min(width, a.value_dim - first));
    });
}

void Provider::gated_rms_norm(const GatedNorm& a, int num_tokens) {
    const int block = 4;
    pool_.run((num_tokens + block - 1) / block, [&](int i, int) {
        kernels_->gated_rms_norm(a, i * block, std::min(block, num_tokens - i * block));
    });
}

}  // namespace elinvar
