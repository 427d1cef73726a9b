// Ops that multiply by packed weights: matrices, adapters, experts.
#include <utility>

#include "bind.h"

namespace elinvar {
namespace {

F32Out embed(Session& p, I32In ids, const BoundMatrix& w, float scale) {
    auto out = result<float>(p, {ids.size(), static_cast<std::size_t>(w.k)});
    submit(p, [&p, &w, scale, i = ids.data(), n = static_cast<int>(ids.size()), o = out.data()] {
        p.embed(i, n, w, scale, o);
    });
    return out;
}

F32Out linear(Session& p, F32In x, const std::vector<const BoundMatrix*>& ws,
              std::optional<F32In> bias) {
    std::size_t n = 0;
    std::vector<const Matrix*> matrices;
    for (const BoundMatrix* w : ws) {
        n += static_cast<std::size_t>(w->n);
        matrices.push_back(w);
    }
    auto out = result<float>(p, {x.shape(0), n});
    submit(p, [&p, x = x.data(), rows = rows_of(x), matrices = std::move(matrices), o = out.data(),
               b = data_of(bias)] { p.linear(x, rows, matrices, o, b); });
    return out;
}

F32Out gated_linear(Session& p, F32In x, const BoundMatrix& gate, const BoundMatrix& up,
                    int activation) {
    auto out = result<float>(p, {x.shape(0), static_cast<std::size_t>(gate.n)});
    submit(p, [&p, &gate, &up, activation, x = x.data(), rows = rows_of(x), o = out.data()] {
        p.gated_linear(x, rows, gate, up, activation, o);
    });
    return out;
}

F32Out head_linear(Session& p, F32In x, const BoundMatrix& w, int heads) {
    auto out = result<float>(p, {x.shape(0), static_cast<std::size_t>(w.n)});
    submit(p, [&p, &w, heads, x = x.data(), rows = rows_of(x), o = out.data()] {
        p.head_linear(x, w.k, rows, w, heads, o, w.n / heads);
    });
    return out;
}

struct BoundLora {  // whoever made the matrices keeps them
    std::vector<LoraTarget> targets;
    BoundLora(const std::vector<int>& columns, std::size_t num_adapters) {
        for (const int col : columns)
            targets.push_back({col, std::vector<LoraTarget::Pair>(num_adapters)});
    }
    void set(std::size_t target, std::size_t adapter, const BoundMatrix& a, const BoundMatrix& b,
             float scale) {
        targets.at(target).pairs.at(adapter) = {&a, &b, scale};
    }
};

void lora(Session& p, nb::ndarray<float, nb::c_contig, nb::device::cpu> y, F32In x, I32In adapters,
          const BoundLora& lora) {
    submit(p, [&p, &lora, x = x.data(), rows = rows_of(x), k = last_of(x), a = adapters.data(),
               y = y.data(), ld = static_cast<std::ptrdiff_t>(y.shape(1))] {
        p.lora(x, rows, k, a, lora.targets, y, ld);
    });
}

struct BoundExperts : Experts {  // whoever made matrices and biases keeps them
    using Matrices = std::vector<const BoundMatrix*>;
    static std::vector<const Matrix*> plain(const Matrices& ws) { return {ws.begin(), ws.end()}; }
    using Bias = std::optional<F32In>;
    BoundExperts(const Matrices& gates, const Matrices& ups, const Matrices& downs,
                 const Bias& of_gates, const Bias& of_ups, const Bias& of_downs)
        : Experts(plain(gates), plain(ups), plain(downs)) {
        gate_bias = data_of(of_gates);
        up_bias = data_of(of_ups);
        down_bias = data_of(of_downs);
    }
};

nb::tuple route(Session& p, F32In logits, int top_k, bool sigmoid, bool renormalise, float scaling,
                std::optional<F32In> bias, int num_groups, int top_groups) {
    const auto k = static_cast<std::size_t>(top_k);
    auto ids = result<int32_t>(p, {logits.shape(0), k});
    auto weights = result<float>(p, {logits.shape(0), k});
    const Route a{last_of(logits), top_k,         sigmoid,    renormalise,
                  scaling,         data_of(bias), num_groups, top_groups};
    submit(p, [&p, a, x = logits.data(), rows = rows_of(logits), ids = ids.data(),
               weights = weights.data()] { p.route(x, rows, a, ids, weights); });
    return nb::make_tuple(ids, weights);
}

F32Out moe(Session& p, F32In x, I32In ids, F32In weights, const BoundExperts& experts,
           int activation, bool scale_inputs) {
    auto out = like(p, x);
    submit(p,
           [&p, &experts, activation, scale_inputs, x = x.data(), rows = rows_of(x),
            top_k = last_of(weights), ids = ids.data(), weights = weights.data(), o = out.data()] {
               p.moe(x, rows, top_k, ids, weights, experts, activation, scale_inputs, o);
           });
    return out;
}

}  // namespace

void bind_linear(nb::class_<Session>& session, nb::module_& m) {
    nb::class_<BoundMatrix>(m, "Matrix").def(nb::init<const std::string&, int, int, U8In>());
    nb::class_<BoundLora>(m, "Lora")
        .def(nb::init<const std::vector<int>&, std::size_t>())
        .def("set", &BoundLora::set);
    nb::class_<BoundExperts>(m, "Experts")
        .def(nb::init<const BoundExperts::Matrices&, const BoundExperts::Matrices&,
                      const BoundExperts::Matrices&, const BoundExperts::Bias&,
                      const BoundExperts::Bias&, const BoundExperts::Bias&>(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    session.def("embed", &embed)
        .def("linear", &linear, nb::arg(), nb::arg(), nb::arg().none())
        .def("gated_linear", &gated_linear)
        .def("head_linear", &head_linear)
        .def("lora", &lora)
        .def("route", &route, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().none(), nb::arg(), nb::arg())
        .def("moe", &moe);
}

}  // namespace elinvar
