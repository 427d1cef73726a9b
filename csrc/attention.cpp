// attention: an item is some tokens of a sequence times the query heads of one KV head; where few
// tokens look far back, each split of their keys is an item and the parts are joined afterwards.
#include <algorithm>

#include "provider.h"

namespace elinvar {
namespace {

constexpr int kTileRows = 48;  // they share the keys that the first of them brought near
// A tile of more tokens goes through its splits alone: prompts have tiles enough, and the parts of
// few tokens stay small beside the keys.
constexpr int kSplitTokens = 4;

}  // namespace

void Provider::attention(const Attention& a, int num_seqs, const int32_t* query_start) {
    const int group = a.heads / a.kv_heads, tile = std::max(1, kTileRows / group);
    const auto part_floats = [&](const AttentionTile& t) {
        return attention_part_floats(t.num_tokens * group, a.padded_dim);
    };
    items_.clear();
    joins_.clear();
    std::size_t parts = 0;
    for (int seq = 0; seq < num_seqs; ++seq)
        for (int t = query_start[seq]; t < query_start[seq + 1]; t += tile) {
            const int count = std::min(tile, query_start[seq + 1] - t);
            const auto [least, most] =
                std::minmax_element(a.positions + t, a.positions + t + count);
            const int first = a.window ? std::max(*least - a.window + 1, 0) / kAttentionSplit : 0;
            const int num = *most / kAttentionSplit + 1 - first;
            for (int head = 0; head < a.kv_heads; ++head) {
                const AttentionTile at{seq, t, count, head};
                if (num == 1 || count > kSplitTokens) {
                    items_.push_back({at, first, num, kOwnParts});
                    continue;
                }
                joins_.push_back({at, first, num, parts});
                for (int i = 0; i < num; ++i, parts += part_floats(at))
                    items_.push_back({at, first + i, 1, parts});
            }
        }
    float* shared = parts_.at_least(parts);
    // Later tiles of a prompt see more keys: the pool counts down, so the long ones go first.
    pool_.run(static_cast<int>(items_.size()), [&](int i, int thread) {
        const AttentionItem& item = items_[static_cast<std::size_t>(i)];
        if (item.parts != kOwnParts) {
            kernels_->attention_part(a, item.tile, item.first_split, shared + item.parts);
            return;
        }
        const std::size_t stride = part_floats(item.tile);
        float* own = scratch(thread, stride * static_cast<std::size_t>(item.num_splits));
        for (int s = 0; s < item.num_splits; ++s)
            kernels_->attention_part(a, item.tile, item.first_split + s,
                                     own + stride * static_cast<std::size_t>(s));
        kernels_->attention_join(a, item.tile, own, item.num_splits);
    });
    pool_.run(static_cast<int>(joins_.size()), [&](int i, int) {
        const AttentionItem& item = joins_[static_cast<std::size_t>(i)];
        kernels_->attention_join(a, item.tile, shared + item.parts, item.num_splits);
    });
}

}  // namespace elinvar
