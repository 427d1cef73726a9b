// attention: one item is some tokens of a sequence times the query heads of one KV head.
#include <algorithm>

#include "provider.h"

namespace elinvar {

void Provider::attention(const Attention& a, int num_seqs, const int32_t* query_start) {
    const int group = a.heads / a.kv_heads;
    const int tile = std::max(1, 16 / group);
    struct Item {
        int seq, first, count;
    };
    std::vector<Item> items;
    for (int r = 0; r < num_seqs; ++r)
        for (int t = query_start[r]; t < query_start[r + 1]; t += tile)
            items.push_back({r, t, std::min(tile, query_start[r + 1] - t)});
    // Later tiles of a prompt see more keys: the pool counts down, so the long ones go first.
    pool_.run(static_cast<int>(items.size()) * a.kv_heads, [&](int i, int thread) {
        const Item& it = items[static_cast<std::size_t>(i / a.kv_heads)];
        float* s = scratch(thread, kernels_->attention_scratch(it.count * group, a.padded_dim));
        kernels_->attention(a, it.seq, it.first, it.count, i % a.kv_heads, s);
    });
}

}  // namespace elinvar
