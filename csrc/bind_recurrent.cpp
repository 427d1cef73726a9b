// Ops of layers with a recurrent state.
#include "bind.h"

namespace elinvar {
namespace {

struct BoundState {  // of one layer: views of a cache in which all layers lie
    using Strided = nb::ndarray<float, nb::device::cpu>;
    Strided tails, states;
    int key_heads, value_dim;
    BoundState(Strided tails_, Strided states_, int key_heads_, int value_dim_)
        : tails(tails_), states(states_), key_heads(key_heads_), value_dim(value_dim_) {}
};

StateTables tables_of(const I32In& query_start, const I32In& seq_lens, const I32In& tables) {
    return {static_cast<int>(seq_lens.size()), query_start.data(), seq_lens.data(), tables.data(),
            static_cast<std::ptrdiff_t>(tables.shape(1))};
}

F32Out causal_conv(Session& p, F32In x, F32In w, BoundState& state, I32In query_start,
                   I32In seq_lens, I32In tables) {
    auto out = result<float>(p, {x.shape(0), w.shape(1)});
    const Convolution a{.x = x.data(),
                        .ld = last_of(x),
                        .w = w.data(),
                        .tails = state.tails.data(),
                        .block_step = state.tails.stride(0),
                        .channels = last_of(w),
                        .taps = rows_of(w),
                        .out = out.data()};
    submit(p, [&p, a, t = tables_of(query_start, seq_lens, tables)] { p.causal_conv(a, t); });
    return out;
}

F32Out delta_rule(Session& p, F32In qkv, F32In x, F32In a_log, F32In dt_bias, BoundState& state,
                  I32In query_start, I32In seq_lens, I32In tables) {
    const auto heads = a_log.size();
    auto out = result<float>(p, {qkv.shape(0), heads * static_cast<std::size_t>(state.value_dim)});
    const DeltaRule a{.qkv = qkv.data(),
                      .x = x.data(),
                      .ld = last_of(x),
                      .a_log = a_log.data(),
                      .dt_bias = dt_bias.data(),
                      .states = state.states.data(),
                      .block_step = state.states.stride(0),
                      .key_heads = state.key_heads,
                      .heads = static_cast<int>(heads),
                      .key_dim = static_cast<int>(state.states.shape(2)),
                      .value_dim = state.value_dim,
                      .out = out.data()};
    submit(p, [&p, a, t = tables_of(query_start, seq_lens, tables)] { p.delta_rule(a, t); });
    return out;
}

F32Out gated_rms_norm(Session& p, F32In x, F32In gate, int first, F32In gain, float eps) {
    auto out = like(p, x);
    const int dim = last_of(gain);
    const GatedNorm a{x.data(), gate.data() + first, last_of(gate), gain.data(),
                      eps,      last_of(x) / dim,    dim,           out.data()};
    submit(p, [&p, a, rows = rows_of(x)] { p.gated_rms_norm(a, rows); });
    return out;
}

F32Out sigmoid_gate(Session& p, F32In x, F32In gate) {
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), gate = gate.data(), n = x.size(), o = out.data()] {
        p.sigmoid_gate(x, gate, n, o);
    });
    return out;
}

}  // namespace

void bind_recurrent(nb::class_<Session>& session, nb::module_& m) {
    nb::class_<BoundState>(m, "State")
        .def(nb::init<BoundState::Strided, BoundState::Strided, int, int>());
    session.def("causal_conv", &causal_conv)
        .def("delta_rule", &delta_rule)
        .def("gated_rms_norm", &gated_rms_norm)
        .def("sigmoid_gate", &sigmoid_gate);
}

}  // namespace elinvar
