// attention: an item is some tokens of a sequence times query heads of one KV head; where few
// tokens look far back, each split of their keys is an item and the parts are joined afterwards.
#include <algorithm>

#include "provider.h"

namespace elinvar {
namespace {

constexpr int kTileRows = 48;  // they share the keys that the first of them brought near
// Query heads of a KV head that share a tile. Where more share its keys (latent attention: all),
// one token makes items for several threads.
constexpr int kTileHeads = 16;
// Each tile of a longer span goes through its splits alone: prompts have tiles enough, and the
// parts of few tokens stay small beside the keys.
constexpr int kSplitTokens = 4;
// Spans of few sequences are cut into smaller tiles until each thread has so many items, though not
// below these rows: else a thread waits where two share three heads, or the one of some models.
constexpr int kItemsOfThread = 2, kFewestRows = 4;
// What a thread takes at once: items of so many blocks that most of them know which one follows,
// but at most this part of its share, which keeps the threads' ends together.
constexpr int kChunkBlocks = 64, kChunksOfThread = 4;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Blocks {
    int first, last;
};

// Those that a tile reads in some splits, by their place in its sequence.
Blocks blocks_of(const Attention& a, const AttentionTile& t, int split, int num_splits) {
    const int least = a.positions[t.first_token];
    const int most = a.positions[t.first_token + t.num_tokens - 1];
    return {std::max(first_key(a, least), split * kAttentionSplit) / 32,
            std::min(most, (split + num_splits) * kAttentionSplit - 1) / 32};
}

AttentionAhead ahead_of(const Attention& a, const AttentionTile& t, int split) {
    const Blocks b = blocks_of(a, t, split, 1);
    const int32_t* table = a.tables + t.seq * a.table_stride;
    const auto place = [&](int block) {
        return std::ptrdiff_t{table[block]} * a.block_step + t.kv_head;
    };
    return {{place(b.first), place(std::min(b.first + 1, b.last))}};
}

}  // namespace

void Provider::attention(const Attention& a, int num_seqs, const int32_t* query_start) {
    const int group = a.heads / a.kv_heads, share = std::min(group, kTileHeads);
    const int largest = std::max(1, kTileRows / share), fewest = ceil_div(kFewestRows, share);
    const int columns = num_seqs * a.kv_heads * ceil_div(group, share);
    const int pieces = ceil_div(kItemsOfThread * pool_.size(), std::max(1, columns));
    const auto part_floats = [&](const AttentionTile& t) {
        return attention_part_floats(t.rows(), a.padded_values());
    };
    items_.clear();
    joins_.clear();
    std::size_t parts = 0;
    for (int seq = 0; seq < num_seqs; ++seq) {
        const int length = query_start[seq + 1] - query_start[seq];
        const bool alone = length > kSplitTokens;
        const int tile = std::clamp(ceil_div(length, pieces), std::min(fewest, largest), largest);
        for (int t = query_start[seq]; t < query_start[seq + 1]; t += tile) {
            const int count = std::min(tile, query_start[seq + 1] - t);
            const auto [least, most] =
                std::minmax_element(a.positions + t, a.positions + t + count);
            const int first = first_key(a, *least) / kAttentionSplit;
            const int num = *most / kAttentionSplit + 1 - first;
            for (int head = 0; head < a.heads;) {
                const int kv_head = head / group, end = (kv_head + 1) * group;
                const AttentionTile at{seq, t, count, kv_head, head, std::min(share, end - head)};
                head += at.num_heads;
                if (num == 1 || alone) {
                    items_.push_back({at, first, num, kOwnParts});
                    continue;
                }
                joins_.push_back({at, first, num, parts});
                for (int i = 0; i < num; ++i, parts += part_floats(at))
                    items_.push_back({at, first + i, 1, parts});
            }
        }
    }
    float* shared = parts_.at_least(parts);
    cut_chunks(a);
    // Later tiles of a prompt see more keys: the pool counts down, so the long ones go first.
    pool_.run(static_cast<int>(chunks_.size()) - 1, [&](int c, int thread) {
        const auto chunk = chunks_.begin() + c;
        // Where threads keep step, the chunk that this one takes next.
        const std::size_t then = *(chunk - std::min(c, pool_.size()));
        for (std::size_t i = chunk[0]; i < chunk[1]; ++i) {
            const AttentionItem& item = items_[i];
            const AttentionItem& next = items_[i + 1 < chunk[1] ? i + 1 : then];
            const AttentionAhead ahead = ahead_of(a, next.tile, next.first_split);
            if (item.parts != kOwnParts) {
                kernels_->attention_part(a, item.tile, item.first_split, ahead,
                                         shared + item.parts);
                continue;
            }
            const std::size_t stride = part_floats(item.tile);
            float* own = scratch(thread, stride * static_cast<std::size_t>(item.num_splits));
            for (int s = 0; s < item.num_splits; ++s) {
                const int split = item.first_split + s;
                kernels_->attention_part(
                    a, item.tile, split,
                    s + 1 < item.num_splits ? ahead_of(a, item.tile, split + 1) : ahead,
                    own + stride * static_cast<std::size_t>(s));
            }
            kernels_->attention_join(a, item.tile, own, item.num_splits);
        }
    });
    pool_.run(static_cast<int>(joins_.size()), [&](int i, int) {
        const AttentionItem& item = joins_[static_cast<std::size_t>(i)];
        kernels_->attention_join(a, item.tile, shared + item.parts, item.num_splits);
    });
}

// An item is some tokens with all their heads, which share their rows.
void Provider::block_shares(const Attention& a, int num_seqs, const int32_t* query_start,
                            float* shares, std::ptrdiff_t stride) {
    struct Item {
        int seq, first, count;
    };
    const int total = query_start[num_seqs];
    const int tile = std::clamp(total / pool_.size(), 1, kTileRows);
    std::vector<Item> items;
    for (int seq = 0; seq < num_seqs; ++seq)
        for (int t = query_start[seq]; t < query_start[seq + 1]; t += tile)
            items.push_back({seq, t, std::min(tile, query_start[seq + 1] - t)});
    pool_.run(static_cast<int>(items.size()), [&](int i, int thread) {
        const auto [seq, first, count] = items[static_cast<std::size_t>(i)];
        const int32_t* at = a.positions + first;
        const int num_blocks = *std::max_element(at, at + count) / 32 + 1;
        float* room = scratch(thread, shares_room(num_blocks));
        kernels_->block_shares(a, seq, first, count, num_blocks, room, shares, stride);
    });
}

// Neighbours in memory go to one thread; each of them asks for the first blocks of the next.
void Provider::cut_chunks(const Attention& a) {
    const auto work = [&](const AttentionItem& item) {
        const Blocks b = blocks_of(a, item.tile, item.first_split, item.num_splits);
        return (b.last - b.first + 1) * item.tile.num_tokens;
    };
    int total = 0;
    for (const AttentionItem& item : items_) total += work(item);
    const int enough = std::min(kChunkBlocks, total / (pool_.size() * kChunksOfThread));
    chunks_.clear();
    int present = enough;
    for (std::size_t i = 0; i < items_.size(); ++i) {
        if (present >= enough) {
            chunks_.push_back(i);
            present = 0;
        }
        present += work(items_[i]);
    }
    chunks_.push_back(items_.size());
}

}  // namespace elinvar
