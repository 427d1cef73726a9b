// route and moe: which experts a token goes to, and the weighted sum of what they give. Tokens are
// grouped by expert; then each expert multiplies its rows as a dense layer does, to the same bits.
#include <algorithm>
#include <cstring>

#include "provider.h"
#include "tiling.h"

namespace elinvar {
namespace {

constexpr float kLowest = -0x1.fffffep127f, kNever = -__builtin_inff();

void score(const Kernels& k, const Route& a, const float* logits, float* scores) {
    const int n = a.num_experts;
    if (a.sigmoid) {
        for (int e = 0; e < n; ++e) scores[e] = -logits[e];
        k.exp_all(scores, n, scores);
        for (int e = 0; e < n; ++e) scores[e] = 1.0f / (1.0f + scores[e]);
        return;
    }
    float most = kLowest;
    for (int e = 0; e < n; ++e) most = std::max(most, logits[e]);
    const float sum = k.scale_logits(logits, n, most, 1.0f, true, scores);
    k.exp_all(scores, n, scores);
    for (int e = 0; e < n; ++e) scores[e] /= sum;
}

// What orders the groups of experts; the lowest where a group has no second expert.
float worth(const Route& a, const float* choice, int size) {
    float best = kNever, second = kNever;
    for (int e = 0; e < size; ++e) {
        second = std::max(second, std::min(best, choice[e]));
        best = std::max(best, choice[e]);
    }
    return a.sigmoid ? best + second : best;
}

// Leaves the experts of the best groups, of equal ones of the first.
void keep_groups(const Route& a, float* choice, float* worths) {
    const int size = a.num_experts / a.num_groups;
    for (int g = 0; g < a.num_groups; ++g) worths[g] = worth(a, choice + g * size, size);
    for (int g = 0; g < a.num_groups; ++g) {
        int better = 0;
        for (int h = 0; h < a.num_groups; ++h)
            better += worths[h] > worths[g] || (worths[h] == worths[g] && h < g);
        if (better >= a.top_groups) std::fill_n(choice + g * size, size, kNever);
    }
}

void route_token(const Kernels& k, const Route& a, const float* logits, float* scratch,
                 int32_t* ids, float* weights) {
    const int n = a.num_experts;
    float *scores = scratch, *choice = scratch + n;
    score(k, a, logits, scores);
    const bool by_score = a.bias || (a.sigmoid && a.num_groups > 1);
    const float* by = by_score ? scores : logits;
    for (int e = 0; e < n; ++e) {
        const float c = a.bias ? by[e] + a.bias[e] : by[e];
        choice[e] = c >= kLowest && logits[e] == logits[e] ? c : kLowest;  // NaN goes last
    }
    if (a.top_groups < a.num_groups) keep_groups(a, choice, choice + n);
    k.top_k(choice, n, a.top_k, ids);
    std::sort(ids, ids + a.top_k);
    float sum = 0;
    for (int j = 0; j < a.top_k; ++j) sum += weights[j] = scores[ids[j]];
    for (int j = 0; j < a.top_k; ++j)
        weights[j] = (a.renormalise ? weights[j] / sum : weights[j]) * a.scaling;
}

}  // namespace

void Provider::route(const float* logits, int rows, const Route& a, int32_t* ids, float* weights) {
    const int block = 16;
    pool_.run((rows + block - 1) / block, [&](int i, int thread) {
        float* s = scratch(thread, static_cast<std::size_t>(2 * a.num_experts + a.num_groups));
        for (int m = i * block; m < std::min(rows, (i + 1) * block); ++m) {
            const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(m) * a.top_k;
            route_token(*kernels_, a, logits + static_cast<std::ptrdiff_t>(m) * a.num_experts, s,
                        ids + at, weights + at);
        }
    });
}

Experts::Experts(std::vector<const Matrix*> gates_, std::vector<const Matrix*> ups_,
                 std::vector<const Matrix*> downs_)
    : gates(std::move(gates_)), ups(std::move(ups_)), downs(std::move(downs_)) {
    for (std::size_t e = 0; e < gates.size(); ++e) {
        for (const Matrix* w : {gates[e], ups[e]}) (w->quantised() ? rounds_x : takes_x) = true;
        rounds_h |= downs[e]->quantised();
    }
}

// Sorts the pairs of token and expert by expert, stably: tokens ascend in a group.
void Mixture::group(int num_tokens, int top_k, const int32_t* ids, int num_experts) {
    const int pairs = num_tokens * top_k;
    ends.assign(static_cast<std::size_t>(num_experts), 0);
    for (int i = 0; i < pairs; ++i) ++ends[static_cast<std::size_t>(ids[i])];
    groups.clear();
    blocks.clear();
    int first = 0;
    for (int e = 0; e < num_experts; ++e) {
        int& end = ends[static_cast<std::size_t>(e)];
        const int count = end;
        end = first;
        if (count == 0) continue;
        for (int row = 0; row < count; row += 16)
            blocks.push_back(
                {static_cast<int>(groups.size()), row, std::min(16, count - row), 0, 0});
        groups.push_back({e, first, count, {}});
        first += count;
    }
    tokens.resize(static_cast<std::size_t>(pairs));
    places.resize(static_cast<std::size_t>(pairs));
    for (int i = 0; i < pairs; ++i) {
        const int row = ends[static_cast<std::size_t>(ids[i])]++;
        places[static_cast<std::size_t>(i)] = row;
        tokens[static_cast<std::size_t>(row)] = i / top_k;
    }
}

// The weights of the rows, and ones in their stead.
void Mixture::scale_inputs(const float* weights, int top_k) {
    factors.resize(places.size());
    for (std::size_t i = 0; i < places.size(); ++i)
        factors[static_cast<std::size_t>(places[i])] = weights[i];
    ones.assign(static_cast<std::size_t>(top_k), 1.0f);
}

// Tiles of about equal time over all groups: to read a panel costs as much as some rows of it.
void Mixture::cut(int k, int panels, bool quantised, int threads) {
    const int reading = quantised ? 4 : 8;
    int total = 0;
    for (const Group& g : groups) total += g.count + reading;
    tiles.clear();
    for (int i = 0; i < static_cast<int>(groups.size()); ++i) {
        const int rows = groups[static_cast<std::size_t>(i)].count;
        const int items = Tiling::wanted(rows, quantised, threads) * (rows + reading) / total;
        const Tiling t(rows, k, panels, quantised, std::max(1, items));
        for (int row = 0; row < rows; row += t.row_block)
            for (int panel = 0; panel < panels; panel += t.chunk)
                tiles.push_back({i, row, std::min(t.row_block, rows - row), panel,
                                 std::min(t.chunk, panels - panel)});
    }
}

// Brings the rows of each group together; a group of all tokens finds them so.
void Provider::gather(const Rows& in, int num_tokens, const Experts& experts) {
    Mixture& m = mixture_;
    const int dim = experts.dim();
    float* x = m.x.at_least(experts.takes_x ? m.tokens.size() * static_cast<std::size_t>(dim) : 0);
    bool apart = false;
    for (auto& g : m.groups) {
        g.in = g.count == num_tokens ? in : Rows{x + g.first * std::ptrdiff_t{dim}, m.rows(g, dim)};
        apart |= g.count < num_tokens;
    }
    if (!apart) return;
    pool_.run(static_cast<int>(m.blocks.size()), [&](int i, int) {
        const auto& b = m.blocks[static_cast<std::size_t>(i)];
        const auto& g = m.groups[static_cast<std::size_t>(b.group)];
        if (g.count == num_tokens) return;
        const int32_t* from = m.tokens.data() + g.first + b.row;
        if (experts.rounds_x)
            kernels_->gather_quant(in.rounded, from, b.count, g.in.rounded, b.row);
        if (!experts.takes_x) return;
        for (int r = 0; r < b.count; ++r)
            std::memcpy(x + (g.first + b.row + r) * std::ptrdiff_t{dim},
                        in.x + from[r] * std::ptrdiff_t{dim}, static_cast<std::size_t>(dim) * 4);
    });
}

void Provider::moe(const float* x, int rows, int top_k, const int32_t* ids, const float* weights,
                   const Experts& experts, int activation, bool scale_inputs, float* out) {
    if (rows == 0) return;
    Mixture& m = mixture_;
    const std::ptrdiff_t dim = experts.dim(), ff = experts.ff_dim();
    const auto pairs = static_cast<std::size_t>(rows) * static_cast<std::size_t>(top_k);
    const Rows in{x, experts.rounds_x ? quantize(x, rows, experts.dim()) : QuantRows{}};
    m.group(rows, top_k, ids, static_cast<int>(experts.gates.size()));
    if (scale_inputs) m.scale_inputs(weights, top_k);
    m.rounded.resize(
        std::max(m.rounded.size(), pairs * static_cast<std::size_t>(std::max(dim, ff) / 32)));
    gather(in, rows, experts);
    float* h = m.h.at_least(pairs * static_cast<std::size_t>(ff));
    float* y = m.y.at_least(pairs * static_cast<std::size_t>(dim));
    const auto each = [&](const std::vector<Mixture::Tile>& tiles, const auto& body) {
        pool_.run(static_cast<int>(tiles.size()), [&](int i, int thread) {
            const Mixture::Tile& t = tiles[static_cast<std::size_t>(i)];
            body(m.groups[static_cast<std::size_t>(t.group)], t, thread);
        });
    };

    m.cut(experts.dim(), experts.gates[0]->num_panels(), experts.rounds_x, pool_.size());
    const auto of = [](const float* biases, const Mixture::Group& g, std::ptrdiff_t outputs) {
        return biases ? biases + g.expert * outputs : nullptr;
    };
    each(m.tiles, [&](const Mixture::Group& g, const Mixture::Tile& t, int thread) {
        const auto e = static_cast<std::size_t>(g.expert);
        multiply_gated(*experts.gates[e], *experts.ups[e], activation, t.panel, t.panels, g.in,
                       t.row, t.count, h + g.first * ff, thread, of(experts.gate_bias, g, ff),
                       of(experts.up_bias, g, ff),
                       scale_inputs ? m.factors.data() + g.first : nullptr);
    });
    if (experts.rounds_h)
        each(m.blocks, [&](const Mixture::Group& g, const Mixture::Tile& b, int) {
            kernels_->quantize_rows(h + g.first * ff, b.count, m.rows(g, experts.ff_dim()), b.row);
        });
    m.cut(experts.ff_dim(), experts.downs[0]->num_panels(), experts.rounds_h, pool_.size());
    each(m.tiles, [&](const Mixture::Group& g, const Mixture::Tile& t, int) {
        const Rows hs{h + g.first * ff, m.rows(g, experts.ff_dim())};
        const int col = t.panel * 16, cols = std::min(t.panels * 16, experts.dim() - col);
        float* o = y + (g.first + t.row) * dim + col;
        multiply(*experts.downs[static_cast<std::size_t>(g.expert)], t.panel, t.panels, hs, t.row,
                 t.count, o, dim);
        if (const float* bias = of(experts.down_bias, g, dim))
            kernels_->add_bias(bias + col, t.count, cols, o, dim);
    });

    const int height = 8, width = 512;  // tokens and columns that one item sums up
    const int across = (experts.dim() + width - 1) / width;
    pool_.run((rows + height - 1) / height * across, [&](int i, int) {
        const int col = i % across * width, cols = std::min(width, experts.dim() - col);
        for (int t = i / across * height; t < std::min(rows, (i / across + 1) * height); ++t) {
            const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * top_k;
            kernels_->weighted_sum(y + col, dim, m.places.data() + at,
                                   scale_inputs ? m.ones.data() : weights + at, top_k, cols,
                                   out + t * dim + col);
        }
    });
}

}  // namespace elinvar
