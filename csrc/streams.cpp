// The provider's ops on several streams (csrc/streams.h): a token is one item.
#include <vector>

#include "provider.h"

namespace elinvar {

void Provider::multiply_rows(const float* x, int rows, int dim, const float* y,
                             std::ptrdiff_t y_step, float* out) {
    pool_.run(rows, [&](int t, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * dim;
        kernels_->multiply(x + at, y + t * y_step, static_cast<std::size_t>(dim), out + at);
    });
}

void Provider::mix(const std::vector<const float*>& xs, int rows, int dim, const float* coefs,
                   int outputs, float* out) {
    const int count = static_cast<int>(xs.size());
    pool_.run(rows, [&](int t, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * dim;
        const float* of_token[kMaxStreams];
        for (int s = 0; s < count; ++s) of_token[s] = xs[static_cast<std::size_t>(s)] + at;
        for (int o = 0; o < outputs; ++o)
            kernels_->mix(of_token, coefs + (static_cast<std::ptrdiff_t>(t) * outputs + o) * count,
                          count, dim, out + static_cast<std::ptrdiff_t>(o) * rows * dim + at);
    });
}

void Provider::sparsify(const float* x, float deviations, int rows, int dim, float* out) {
    pool_.run(rows, [&](int t, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * dim;
        kernels_->sparsify(x + at, deviations, dim, out + at);
    });
}

void Provider::match_rms(const float* x, const float* y, int rows, int dim, float* out) {
    pool_.run(rows, [&](int t, int) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * dim;
        kernels_->match_rms(x + at, y + at, dim, out + at);
    });
}

void Provider::rope_queries(const Rope& a, int num_tokens) {
    pool_.run(num_tokens, [&](int t, int) { kernels_->rope_queries(a, t, 1); });
}

}  // namespace elinvar
