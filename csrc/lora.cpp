// lora: what each row's adapter adds to the outputs of a linear, and gated, the end of a
// gated_linear whose products wait for that. Rows are grouped by adapter, and each group multiplies
// as a linear does: no output sees another row.
#include <algorithm>
#include <cstring>

#include "provider.h"

namespace elinvar {
namespace {

constexpr int kBlock = 64, kWidth = 32;  // rows and panels of a tile: its scratch stays in L2

bool adapts(const std::vector<LoraTarget>& targets, int adapter) {
    return std::any_of(targets.begin(), targets.end(), [&](const LoraTarget& t) {
        return t.pairs[static_cast<std::size_t>(adapter)].a != nullptr;
    });
}

}  // namespace

// Groups in the order of their first rows; a target whose A another target has shares its product.
void LoraWork::group(const int32_t* adapters, int rows, const std::vector<LoraTarget>& targets) {
    order.clear();
    groups.clear();
    halves.clear();
    wholes.clear();
    std::ptrdiff_t at = 0;
    for (int row = 0; row < rows; ++row) {
        const int adapter = adapters[row];
        const auto known = [&](const Group& g) { return g.adapter == adapter; };
        if (adapter < 0 || !adapts(targets, adapter) ||
            std::any_of(groups.begin(), groups.end(), known))
            continue;
        const int first = static_cast<int>(order.size());
        for (int r = row; r < rows; ++r)
            if (adapters[r] == adapter) order.push_back(r);
        const int index = static_cast<int>(groups.size());
        groups.push_back({adapter, first, static_cast<int>(order.size()) - first});
        const auto own = static_cast<int>(halves.size());
        for (const LoraTarget& t : targets) {
            const LoraTarget::Pair& p = t.pairs[static_cast<std::size_t>(adapter)];
            if (!p.a) continue;
            const auto end = static_cast<int>(halves.size());
            int half = own;
            while (half < end && (halves[static_cast<std::size_t>(half)].a != p.a ||
                                  halves[static_cast<std::size_t>(half)].scale != p.scale))
                ++half;
            if (half == end) {
                halves.push_back({index, p.a, p.scale, at});
                at += std::ptrdiff_t{groups.back().count} * p.a->n;
            }
            wholes.push_back({half, t.col, p.b});
        }
    }
}

void LoraWork::cut(int of, int rows, int panels, int width) {
    for (int row = 0; row < rows; row += kBlock)
        for (int panel = 0; panel < panels; panel += width)
            tiles.push_back(
                {of, row, std::min(kBlock, rows - row), panel, std::min(width, panels - panel)});
}

void Provider::lora(const float* x, int rows, int k, const int32_t* adapters,
                    const std::vector<LoraTarget>& targets, float* y, std::ptrdiff_t ld) {
    LoraWork& w = lora_;
    w.group(adapters, rows, targets);
    if (w.groups.empty()) return;
    const auto total = w.order.size(), row_floats = static_cast<std::size_t>(k);
    float* own = w.x.at_least(total * row_floats);
    pool_.run(static_cast<int>((total + 15) / 16), [&](int block, int) {
        for (std::size_t i = std::size_t(block) * 16;
             i < std::min(total, std::size_t(block) * 16 + 16); ++i)
            std::memcpy(own + i * row_floats, x + std::ptrdiff_t{w.order[i]} * k, row_floats * 4);
    });
    const auto each = [&](const auto& body) {
        pool_.run(static_cast<int>(w.tiles.size()),
                  [&](int i, int thread) { body(w.tiles[static_cast<std::size_t>(i)], thread); });
    };
    const auto half_of = [&](int i) -> const LoraWork::Half& {
        return w.halves[static_cast<std::size_t>(i)];
    };
    const auto group_of = [&](const LoraWork::Half& h) -> const LoraWork::Group& {
        return w.groups[static_cast<std::size_t>(h.group)];
    };

    const LoraWork::Half& last = w.halves.back();
    float* h = w.h.at_least(
        static_cast<std::size_t>(last.at + std::ptrdiff_t{group_of(last).count} * last.a->n));
    w.tiles.clear();
    for (std::size_t i = 0; i < w.halves.size(); ++i)
        w.cut(static_cast<int>(i), group_of(w.halves[i]).count, w.halves[i].a->num_panels(), 1);
    each([&](const LoraWork::Tile& t, int) {
        const LoraWork::Half& half = half_of(t.of);
        const Matrix& a = *half.a;
        const int col = t.panel * 16, cols = std::min(t.panels * 16, a.n - col);
        float* out = h + half.at + std::ptrdiff_t{t.row} * a.n + col;
        kernels_->linear_float(a.kind, a.panel(t.panel), a.panel_bytes, t.panels,
                               own + std::ptrdiff_t{group_of(half).first + t.row} * k, k, t.count,
                               out, a.n, cols, true);
        for (int m = 0; m < t.count; ++m, out += a.n)
            kernels_->scale(out, half.scale, static_cast<std::size_t>(cols), out);
    });

    w.tiles.clear();
    for (std::size_t i = 0; i < w.wholes.size(); ++i)
        w.cut(static_cast<int>(i), group_of(half_of(w.wholes[i].half)).count,
              w.wholes[i].b->num_panels(), kWidth);
    each([&](const LoraWork::Tile& t, int thread) {
        const LoraWork::Whole& whole = w.wholes[static_cast<std::size_t>(t.of)];
        const LoraWork::Half& half = half_of(whole.half);
        const Matrix& b = *whole.b;
        const int cols = std::min(t.panels * 16, b.n - t.panel * 16);
        const auto bytes = static_cast<std::size_t>(cols) * 4;
        const int* order = w.order.data() + group_of(half).first + t.row;
        float* to = y + whole.col + t.panel * 16;
        // The kernels take rows that lie evenly.
        float* chains = scratch(thread, static_cast<std::size_t>(t.count * cols));
        for (int m = 0; m < t.count; ++m) std::memcpy(chains + m * cols, to + order[m] * ld, bytes);
        kernels_->linear_float(b.kind, b.panel(t.panel), b.panel_bytes, t.panels,
                               h + half.at + std::ptrdiff_t{t.row} * b.k, b.k, t.count, chains,
                               cols, cols, false);
        for (int m = 0; m < t.count; ++m) std::memcpy(to + order[m] * ld, chains + m * cols, bytes);
    });
}

void Provider::gated(const float* x, int rows, int cols, int activation, float* out) {
    const int block = 8;
    const std::ptrdiff_t n = cols;
    pool_.run((rows + block - 1) / block, [&](int i, int) {
        const int first = i * block, count = std::min(block, rows - first);
        for (int m = first; m < first + count; ++m)
            std::memcpy(out + m * n, x + 2 * m * n, static_cast<std::size_t>(cols) * 4);
        kernels_->activate(activation, out + first * n, n, x + 2 * first * n + n, 2 * n, count,
                           cols);
    });
}

}  // namespace elinvar
