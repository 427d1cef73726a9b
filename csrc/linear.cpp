// linear and gated_linear: one list of work items, blocks of rows times chunks of panels.
#include <algorithm>
#include <stdexcept>

#include "provider.h"
#include "tiling.h"

namespace elinvar {
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
        case Kind::int8:  // of the cache alone
            break;
    }
    return (size + 63) / 64 * 64;
}

Matrix::Matrix(Kind kind_, int n_, int k_, const uint8_t* data_, std::size_t bytes)
    : kind(kind_), n(n_), k(k_), data(data_), panel_bytes(elinvar::panel_bytes(kind_, k_)) {
    if (panel_bytes * static_cast<std::size_t>(num_panels()) != bytes)
        throw std::invalid_argument("packed weight has the wrong number of bytes");
}

QuantRows Provider::quantize(const float* x, int rows, int k) {
    const int groups = k / 32;
    const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(groups);
    if (groups_.size() < count) groups_.resize(count);
    const QuantRows rounded{groups_.data(), rows, groups};
    const int block = 16;
    pool_.run((rows + block - 1) / block, [&](int i, int) {
        kernels_->quantize_rows(x, std::min(block, rows - i * block), rounded, i * block);
    });
    return rounded;
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
    const Rows in{x, quantised ? quantize(x, rows, k) : QuantRows{}};
    // The matrices' panels form one list: a chunk may begin in one and end in the next, so that
    // small ones make neither small chunks nor idle threads.
    int panels = 0;
    for (const Matrix* w : ws) panels += w->num_panels();
    const Tiling t(rows, k, panels, quantised, Tiling::wanted(rows, quantised, pool_.size()));
    pool_.run(t.count(), [&](int item, int) {
        const int row = item / t.chunks * t.row_block;
        const int count = std::min(t.row_block, rows - row);
        int first = item % t.chunks * t.chunk, last = first + t.chunk, col = 0;
        for (const Matrix* w : ws) {
            const int from = std::max(first, 0), to = std::min(last, w->num_panels());
            if (from < to) {
                const int at = col + from * 16, cols = std::min(to * 16, w->n) - from * 16;
                float* o = out + row * ld + at;
                multiply(*w, from, to - from, in, row, count, o, ld);
                if (bias) kernels_->add_bias(bias + at, count, cols, o, ld);
            }
            first -= w->num_panels();
            last -= w->num_panels();
            col += w->n;
        }
    });
}

// Rows row .. row + count - 1 times `num` panels of w.
void Provider::multiply(const Matrix& w, int panel, int num, const Rows& in, int row, int count,
                        float* out, std::ptrdiff_t ld) {
    const int cols = std::min(num * 16, w.n - panel * 16);
    if (w.quantised())
        kernels_->linear_quant(w.kind, w.panel(panel), w.panel_bytes, num, in.rounded, row, count,
                               out, ld, cols);
    else
        kernels_->linear_float(w.kind, w.panel(panel), w.panel_bytes, num,
                               in.x + static_cast<std::ptrdiff_t>(row) * w.k, w.k, count, out, ld,
                               cols, true);
}

// The same of a gated pair; out is [rows, gate.n], of which these panels are written. factors: one
// of each row, if any.
void Provider::multiply_gated(const Matrix& gate, const Matrix& up, int activation, int panel,
                              int num, const Rows& in, int row, int count, float* out, int thread,
                              const float* gate_bias, const float* up_bias, const float* factors) {
    const int cols = std::min(num * 16, gate.n - panel * 16);
    float* g = out + static_cast<std::ptrdiff_t>(row) * gate.n + panel * 16;
    const std::ptrdiff_t ld_up = num * 16;
    float* u = scratch(thread, static_cast<std::size_t>(count) * static_cast<std::size_t>(ld_up));
    multiply(gate, panel, num, in, row, count, g, gate.n);
    multiply(up, panel, num, in, row, count, u, ld_up);
    for (int r = 0; factors && r < count; ++r)
        for (float* o : {g + static_cast<std::ptrdiff_t>(r) * gate.n, u + r * ld_up})
            kernels_->scale(o, factors[row + r], static_cast<std::size_t>(cols), o);
    if (gate_bias) kernels_->add_bias(gate_bias + panel * 16, count, cols, g, gate.n);
    if (up_bias) kernels_->add_bias(up_bias + panel * 16, count, cols, u, ld_up);
    kernels_->activate(activation, g, gate.n, u, ld_up, count, cols);
}

void Provider::gated_linear(const float* x, int rows, const Matrix& gate, const Matrix& up,
                            int activation, float* out) {
    if (rows == 0) return;
    const int k = gate.k, panels = gate.num_panels();
    const bool quantised = gate.quantised() || up.quantised();
    const Rows in{x, quantised ? quantize(x, rows, k) : QuantRows{}};
    const Tiling t(rows, k, panels, quantised, Tiling::wanted(rows, quantised, pool_.size()));
    pool_.run(t.count(), [&](int item, int thread) {
        const int row = item / t.chunks * t.row_block, panel = item % t.chunks * t.chunk;
        multiply_gated(gate, up, activation, panel, std::min(t.chunk, panels - panel), in, row,
                       std::min(t.row_block, rows - row), out, thread);
    });
}

}  // namespace elinvar
