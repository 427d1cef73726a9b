// linear and gated_linear: one list of work items, blocks of rows times chunks of panels.
#include <algorithm>
#include <stdexcept>

#include "provider.h"

namespace elinvar {
namespace {

// Work items of a GEMM: blocks of rows small enough for their activations to stay in the L2
// cache, times chunks of panels, few as each begins cold, fine enough to balance threads. The
// kernel of float weights keeps panels in L2 and takes its rows from L3: it wants larger blocks,
// and its panels in pairs.
struct Tiling {
    int row_block, row_blocks, chunk, chunks;

    Tiling(int rows, int k, int panels, bool quantised, int threads) {
        const int row_bytes = quantised ? k / 32 * int{sizeof(QuantGroup)} : 4 * k;
        const int most = std::max(8, (quantised ? 256 : 1024) * 1024 / row_bytes);
        row_blocks = (rows + most - 1) / most;
        row_block = ((rows + row_blocks - 1) / row_blocks + 7) / 8 * 8;  // a tile begins there
        row_blocks = (rows + row_block - 1) / row_block;
        const int a_thread = rows <= (quantised ? 4 : 32) ? 2 : quantised ? 3 : 6;
        const int wanted = threads == 1 ? 1 : (threads * a_thread + row_blocks - 1) / row_blocks;
        chunk = (panels + wanted - 1) / wanted;
        if (!quantised) chunk = (chunk + 1) / 2 * 2;
        chunks = (panels + chunk - 1) / chunk;
    }
    int count() const { return row_blocks * chunks; }
};

}  // namespace

std::size_t panel_bytes(Kind kind, int k) {
    const auto kk = static_cast<std::size_t>(k);
    std::size_t size = 0;
    switch (kind) {
        case Kind::q4:
        case Kind::q5:
        case Kind::q8:
            size = kk / 32 * static_cast<std::size_t>(group_bytes(kind));
            break;
        case Kind::f16:
        case Kind::bf16:
            size = kk * 32;
            break;
        case Kind::f32:
            size = kk * 64;
            break;
    }
    return (size + 63) / 64 * 64;
}

Matrix::Matrix(Kind kind_, int n_, int k_, const uint8_t* data_, std::size_t bytes)
    : kind(kind_), n(n_), k(k_), data(data_), panel_bytes(elinvar::panel_bytes(kind_, k_)) {
    if (panel_bytes * static_cast<std::size_t>(num_panels()) != bytes)
        throw std::invalid_argument("packed weight has the wrong number of bytes");
}

const QuantRows& Provider::quantize(const float* x, int rows, int k) {
    const int groups = k / 32;
    const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(groups);
    if (groups_.size() < count) groups_.resize(count);
    quant_ = {groups_.data(), rows, groups};
    const int block = 16;
    pool_.run((rows + block - 1) / block, [&](int i, int) {
        kernels_->quantize_rows(x, std::min(block, rows - i * block), quant_, i * block);
    });
    return quant_;
}

void Provider::linear(const float* x, int rows, const std::vector<const Matrix*>& ws, float* out,
                      const float* bias) {
    if (rows == 0) return;
    const int k = ws[0]->k;
    std::ptrdiff_t ld = 0;
    bool quantised = false;
    for (const Matrix* w : ws) {
        ld += w->n;
        quantised |= w->quantised();
    }
    if (quantised) quantize(x, rows, k);
    // The matrices' panels form one list: a chunk may begin in one and end in the next, so that
    // small ones make neither small chunks nor idle threads.
    int panels = 0;
    for (const Matrix* w : ws) panels += w->num_panels();
    const Tiling t(rows, k, panels, quantised, pool_.size());
    pool_.run(t.count(), [&](int item, int) {
        const int row = item / t.chunks * t.row_block;
        const int count = std::min(t.row_block, rows - row);
        int first = item % t.chunks * t.chunk, last = first + t.chunk, col = 0;
        for (const Matrix* w : ws) {
            const int from = std::max(first, 0), to = std::min(last, w->num_panels());
            if (from < to) {
                const int at = col + from * 16, cols = std::min(to * 16, w->n) - from * 16;
                float* o = out + row * ld + at;
                multiply(*w, from, to - from, x, row, count, o, ld);
                if (bias) kernels_->add_bias(bias + at, count, cols, o, ld);
            }
            first -= w->num_panels();
            last -= w->num_panels();
            col += w->n;
        }
    });
}

// Rows row .. row + count - 1 of x, or of their rounded form, times `num` panels of w.
void Provider::multiply(const Matrix& w, int panel, int num, const float* x, int row, int count,
                        float* out, std::ptrdiff_t ld) {
    const int cols = std::min(num * 16, w.n - panel * 16);
    if (w.quantised())
        kernels_->linear_quant(w.kind, w.panel(panel), w.panel_bytes, num, quant_, row, count, out,
                               ld, cols);
    else
        kernels_->linear_float(w.kind, w.panel(panel), w.panel_bytes, num,
                               x + static_cast<std::ptrdiff_t>(row) * w.k, w.k, count, out, ld,
                               cols);
}

void Provider::gated_linear(const float* x, int rows, const Matrix& gate, const Matrix& up,
                            int activation, float* out) {
    if (rows == 0) return;
    const int k = gate.k, n = gate.n;
    const bool quantised = gate.quantised() || up.quantised();
    if (quantised) quantize(x, rows, k);
    const Tiling t(rows, k, gate.num_panels(), quantised, pool_.size());
    pool_.run(t.count(), [&](int item, int thread) {
        const int row = item / t.chunks * t.row_block, panel = item % t.chunks * t.chunk;
        const int m = std::min(t.row_block, rows - row);
        const int panels = std::min(t.chunk, gate.num_panels() - panel);
        const int cols = std::min(panels * 16, n - panel * 16);
        float* g = out + static_cast<std::ptrdiff_t>(row) * n + panel * 16;
        const std::ptrdiff_t ld_up = panels * 16;
        float* u = scratch(thread, static_cast<std::size_t>(m) * static_cast<std::size_t>(ld_up));
        multiply(gate, panel, panels, x, row, m, g, n);
        multiply(up, panel, panels, x, row, m, u, ld_up);
        kernels_->activate(activation, g, n, u, ld_up, m, cols);
    });
}

}  // namespace elinvar
