// Latent attention's ops around `attention`: a matrix of its own for every head, the cache write.
#include <algorithm>
#include <cstring>

#include "provider.h"

namespace elinvar {

// The inputs of a head begin `x_step` floats after those of the head before it, and so do its
// outputs `out_step` after.
void Provider::head_linear(const float* x, int x_step, int rows, const Matrix& w, int heads,
                           float* out, int out_step) {
    if (rows == 0) return;
    const std::ptrdiff_t k = w.k, groups = k / 32;
    const auto num_inputs = static_cast<std::size_t>(heads * rows * k);
    float* inputs = gathered_.at_least(num_inputs);
    if (w.quantised() && groups_.size() < num_inputs / 32) groups_.resize(num_inputs / 32);
    const auto rounded = [&](int h) {
        return QuantRows{groups_.data() + h * rows * groups, rows, groups};
    };
    // The kernels take rows that lie one after the other.
    pool_.run(heads, [&](int h, int) {
        float* own = inputs + h * rows * k;
        for (std::ptrdiff_t m = 0; m < rows; ++m)
            std::memcpy(own + m * k, x + (m * heads + h) * x_step, static_cast<std::size_t>(k) * 4);
        if (w.quantised()) kernels_->quantize_rows(own, rows, rounded(h), 0);
    });
    const int panels = w.n / heads / 16;
    const int wanted = (2 * pool_.size() + heads - 1) / heads;
    const int chunk = (panels + wanted - 1) / wanted, chunks = (panels + chunk - 1) / chunk;
    pool_.run(heads * chunks, [&](int item, int) {
        const int h = item / chunks, first = item % chunks * chunk;
        const int num = std::min(chunk, panels - first);
        const uint8_t* from = w.panel(h * panels + first);
        float* o = out + std::ptrdiff_t{h} * out_step + first * 16;
        const std::ptrdiff_t ld = std::ptrdiff_t{heads} * out_step;
        if (w.quantised())
            kernels_->linear_quant(w.kind, from, w.panel_bytes, num, rounded(h), 0, rows, o, ld,
                                   num * 16);
        else
            kernels_->linear_float(w.kind, from, w.panel_bytes, num, inputs + h * rows * k, w.k,
                                   rows, o, ld, num * 16, true);
    });
}

void Provider::latent_query(const LatentQuery& a, int num_tokens, const Matrix& w) {
    head_linear(a.q, a.nope_dim + a.rope_dim, num_tokens, w, a.heads, a.out, a.rank + a.rope_dim);
    const int block = 8;
    pool_.run((num_tokens + block - 1) / block, [&](int i, int) {
        kernels_->latent_rotate(a, i * block, std::min(block, num_tokens - i * block));
    });
}

void Provider::latent_write(const Latent& a, int num_tokens) {
    const int block = std::min(32, (num_tokens + 2 * pool_.size() - 1) / (2 * pool_.size()));
    pool_.run((num_tokens + block - 1) / block, [&](int i, int) {
        kernels_->latent_write(a, i * block, std::min(block, num_tokens - i * block));
    });
}

}  // namespace elinvar
