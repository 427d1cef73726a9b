#include "provider.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace elinvar {
namespace {

const Kernels* choose(const std::string& simd) {
    int count = 0;
    const Kernels* const* all = available_kernels(&count);
    if (simd.empty()) return all[0];
    for (int i = 0; i < count; ++i)
        if (simd == all[i]->name) return all[i];
    throw std::invalid_argument("this machine has no instruction set " + simd);
}

}  // namespace

Provider::Provider(int num_threads, const std::string& simd)
    : kernels_(choose(simd)), pool_(num_threads), scratch_(static_cast<std::size_t>(num_threads)) {}

float* Provider::scratch(int thread, std::size_t floats) {
    return scratch_[static_cast<std::size_t>(thread)].at_least(floats);
}

void Provider::embed(const int32_t* ids, int rows, const Matrix& w, float scale, float* out) {
    for (int m = 0; m < rows; ++m) {
        const int id = ids[m] < w.n ? ids[m] : 0;
        const uint8_t* panel = w.panel(id / 16);
        const int col = id % 16;
        float* o = out + static_cast<std::ptrdiff_t>(m) * w.k;
        const auto half = [](const uint8_t* p) {
            uint16_t h;
            std::memcpy(&h, p, 2);
            return half_value(h);
        };
        for (int k = 0; k < w.k; ++k) {
            const int g = k / 32, i = k % 32;
            float value = 0;
            switch (w.kind) {
                case Kind::q4:
                case Kind::q5: {
                    const uint8_t* group = panel + g * group_bytes(w.kind);
                    const int c = i / 8, at = col * 4 + i % 4, high = i % 8 / 4;
                    int code = group[64 * c + at] >> 4 * high & 15;
                    if (w.kind == Kind::q5) code |= (group[256 + at] >> (4 * high + c) & 1) << 4;
                    const uint8_t* scale = group + code_bytes(w.kind) + 2 * col;
                    const float product = static_cast<float>(code) * half(scale);
                    value = product + half(scale + 32);
                    break;
                }
                case Kind::q8: {
                    const uint8_t* group = panel + g * group_bytes(w.kind);
                    const auto code = static_cast<int8_t>(group[i / 4 * 64 + col * 4 + i % 4]);
                    value = static_cast<float>(code) * half(group + code_bytes(w.kind) + 2 * col);
                    break;
                }
                case Kind::f32:
                    std::memcpy(&value, panel + (k * 16 + col) * 4, 4);
                    break;
                case Kind::f16:
                case Kind::bf16: {
                    uint16_t h;
                    std::memcpy(&h, panel + (k * 16 + col) * 2, 2);
                    value = w.kind == Kind::f16 ? half_value(h) : bf16_value(h);
                    break;
                }
                case Kind::int8:  // of the cache alone
                    break;
            }
            o[k] = value * scale;
        }
    }
}

void Provider::rms_norm(const float* x, const float* y, const float* gain, float eps, int rows,
                        int dim, float* sum, float* out) {
    const int block = 16;
    pool_.run((rows + block - 1) / block, [&](int i, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(i) * block * dim;
        kernels_->rms_norm(x + at, y ? y + at : nullptr, gain, eps,
                           std::min(block, rows - i * block), dim, sum ? sum + at : nullptr,
                           out + at);
    });
}

void Provider::add(const float* x, const float* y, std::size_t n, float* out) {
    kernels_->add(x, y, n, out);
}

void Provider::concat(const float* x, int x_dim, const float* y, int y_dim, int rows, float* out) {
    const std::ptrdiff_t dim = std::ptrdiff_t{x_dim} + y_dim;
    pool_.run(rows, [&](int r, int) {
        std::copy_n(x + r * std::ptrdiff_t{x_dim}, x_dim, out + r * dim);
        std::copy_n(y + r * std::ptrdiff_t{y_dim}, y_dim, out + r * dim + x_dim);
    });
}

void Provider::layer_norm(const float* x, const float* y, const float* gain, const float* bias,
                          float eps, int rows, int dim, float* sum, float* out) {
    const int block = 16;
    pool_.run((rows + block - 1) / block, [&](int i, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(i) * block * dim;
        kernels_->layer_norm(x + at, y ? y + at : nullptr, gain, bias, eps,
                             std::min(block, rows - i * block), dim, sum ? sum + at : nullptr,
                             out + at);
    });
}

template <class Body>
void Provider::in_pieces(std::size_t n, const Body& body) {
    const std::size_t piece = 8192;
    pool_.run(static_cast<int>((n + piece - 1) / piece), [&](int i, int) {
        const std::size_t first = static_cast<std::size_t>(i) * piece;
        body(first, std::min(piece, n - first));
    });
}

void Provider::activate(const float* x, int activation, std::size_t n, float* out) {
    in_pieces(n, [&](std::size_t first, std::size_t count) {
        kernels_->activate_all(activation, x + first, count, out + first);
    });
}

void Provider::scale(const float* x, float factor, std::size_t n, float* out) {
    in_pieces(n, [&](std::size_t first, std::size_t count) {
        kernels_->scale(x + first, factor, count, out + first);
    });
}

void Provider::scale_heads(const float* q, int rows, int width, const int32_t* positions,
                           const float* factors, float* out) {
    pool_.run(rows, [&](int m, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(m) * width;
        kernels_->scale(q + at, factors[positions[m]], static_cast<std::size_t>(width), out + at);
    });
}

void Provider::softcap(const float* x, float cap, std::size_t n, float* out) {
    in_pieces(n, [&](std::size_t first, std::size_t count) {
        kernels_->softcap(x + first, cap, count, out + first);
    });
}

void Provider::sigmoid_gate(const float* x, const float* gate, std::size_t n, float* out) {
    in_pieces(n, [&](std::size_t first, std::size_t count) {
        kernels_->sigmoid_gate(x + first, gate + first, count, out + first);
    });
}

void Provider::pool(const float* x, int dim, const int32_t* starts, int num_seqs,
                    const float* weights, float* out) {
    for (int i = static_cast<int>(ascending_.size()); i < starts[num_seqs]; ++i)
        ascending_.push_back(i);
    const int cols = 64, pieces = (dim + cols - 1) / cols;
    pool_.run(num_seqs * pieces, [&](int item, int) {
        const int seq = item / pieces, first = item % pieces * cols, start = starts[seq];
        kernels_->weighted_sum(x + first, dim, ascending_.data() + start, weights + start,
                               starts[seq + 1] - start, std::min(cols, dim - first),
                               out + std::ptrdiff_t{seq} * dim + first);
    });
}

void Provider::rope_write(const Rope& a, int num_tokens) {
    // Neighbours of one prompt share cache lines of the keys.
    const int block = std::min(32, (num_tokens + 2 * pool_.size() - 1) / (2 * pool_.size()));
    pool_.run((num_tokens + block - 1) / block, [&](int i, int) {
        kernels_->rope_write(a, i * block, std::min(block, num_tokens - i * block));
    });
}

}  // namespace elinvar
