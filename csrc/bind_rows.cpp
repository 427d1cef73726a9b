// Ops on rows: norms, activations, what goes element by element, residual streams, pools.
#include <utility>

#include "bind.h"

namespace elinvar {
namespace {

F32Out rms_norm(Session& p, F32In x, F32In gain, float eps) {
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), gain = gain.data(), eps, rows = rows_of(x), dim = last_of(x),
               o = out.data()] { p.rms_norm(x, nullptr, gain, eps, rows, dim, nullptr, o); });
    return out;
}

nb::tuple add_rms_norm(Session& p, F32In x, F32In y, F32In gain, float eps) {
    auto sum = like(p, x);
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), y = y.data(), gain = gain.data(), eps, rows = rows_of(x),
               dim = last_of(x), s = sum.data(),
               o = out.data()] { p.rms_norm(x, y, gain, eps, rows, dim, s, o); });
    return nb::make_tuple(sum, out);
}

F32Out layer_norm(Session& p, F32In x, F32In gain, std::optional<F32In> bias, float eps) {
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), gain = gain.data(), bias = data_of(bias), eps, rows = rows_of(x),
               dim = last_of(x), o = out.data()] {
        p.layer_norm(x, nullptr, gain, bias, eps, rows, dim, nullptr, o);
    });
    return out;
}

nb::tuple add_layer_norm(Session& p, F32In x, F32In y, F32In gain, std::optional<F32In> bias,
                         float eps) {
    auto sum = like(p, x);
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), y = y.data(), gain = gain.data(), bias = data_of(bias), eps,
               rows = rows_of(x), dim = last_of(x), s = sum.data(),
               o = out.data()] { p.layer_norm(x, y, gain, bias, eps, rows, dim, s, o); });
    return nb::make_tuple(sum, out);
}

F32Out match_rms(Session& p, F32In x, F32In y) {
    auto out = like(p, x);
    submit(p, [&p, x = x.data(), y = y.data(), rows = rows_of(x), dim = last_of(x),
               o = out.data()] { p.match_rms(x, y, rows, dim, o); });
    return out;
}

F32Out add(Session& p, F32In x, F32In y) {
    auto out = like(p, x);
    submit(p,
           [&p, x = x.data(), y = y.data(), n = x.size(), o = out.data()] { p.add(x, y, n, o); });
    return out;
}

F32Out mul(Session& p, F32In x, F32In y, int start) {
    auto out = like(p, x);
    const std::ptrdiff_t step = y.shape(0) == 1 ? 0 : last_of(y);
    submit(p, [&p, step, x = x.data(), rows = rows_of(x), dim = last_of(x), y = y.data() + start,
               o = out.data()] { p.multiply_rows(x, rows, dim, y, step, o); });
    return out;
}

F32Out concat(Session& p, F32In x, F32In y) {
    auto out = result<float>(p, {x.shape(0), x.shape(1) + y.shape(1)});
    submit(p, [&p, x = x.data(), y = y.data(), rows = rows_of(x), dx = last_of(x), dy = last_of(y),
               o = out.data()] { p.concat(x, dx, y, dy, rows, o); });
    return out;
}

F32Out scale(Session& p, F32In x, float factor) {
    auto out = like(p, x);
    submit(p,
           [&p, factor, x = x.data(), n = x.size(), o = out.data()] { p.scale(x, factor, n, o); });
    return out;
}

F32Out scale_heads(Session& p, F32In q, I32In positions, F32In factors) {
    auto out = result<float>(p, {q.shape(0), q.shape(1), q.shape(2)});
    keep(p, factors);
    submit(p, [&p, q = q.data(), rows = rows_of(q),
               width = static_cast<int>(q.shape(1) * q.shape(2)), at = positions.data(),
               f = factors.data(), o = out.data()] { p.scale_heads(q, rows, width, at, f, o); });
    return out;
}

F32Out softcap(Session& p, F32In x, float cap) {
    auto out = like(p, x);
    submit(p, [&p, cap, x = x.data(), n = x.size(), o = out.data()] { p.softcap(x, cap, n, o); });
    return out;
}

F32Out activate(Session& p, F32In x, int activation) {
    auto out = like(p, x);
    submit(p, [&p, activation, x = x.data(), n = x.size(), o = out.data()] {
        p.activate(x, activation, n, o);
    });
    return out;
}

F32Out gated(Session& p, F32In x, int activation) {
    auto out = result<float>(p, {x.shape(0), x.shape(1) / 2});
    submit(p, [&p, activation, x = x.data(), rows = rows_of(x), cols = last_of(x) / 2,
               o = out.data()] { p.gated(x, rows, cols, activation, o); });
    return out;
}

F32Out mix(Session& p, const std::vector<F32In>& xs, F32In coefs) {
    const F32In& x = xs[0];
    const std::size_t outputs = coefs.shape(1) / xs.size();
    auto out = result<float>(p, {outputs, x.shape(0), x.shape(1)});
    std::vector<const float*> data;
    for (const F32In& one : xs) data.push_back(one.data());
    submit(p, [&p, data = std::move(data), rows = rows_of(x), dim = last_of(x),
               outputs = static_cast<int>(outputs), c = coefs.data(),
               o = out.data()] { p.mix(data, rows, dim, c, outputs, o); });
    return out;
}

F32Out sparsify(Session& p, F32In x, float deviations) {
    auto out = like(p, x);
    submit(p, [&p, deviations, x = x.data(), rows = rows_of(x), dim = last_of(x), o = out.data()] {
        p.sparsify(x, deviations, rows, dim, o);
    });
    return out;
}

F32Out pool(Session& p, F32In x, I32In starts, F32In weights) {
    const std::size_t seqs = starts.size() - 1;
    auto out = result<float>(p, {seqs, x.shape(1)});
    submit(p, [&p, x = x.data(), dim = last_of(x), starts = starts.data(),
               seqs = static_cast<int>(seqs), weights = weights.data(),
               o = out.data()] { p.pool(x, dim, starts, seqs, weights, o); });
    return out;
}

}  // namespace

void bind_rows(nb::class_<Session>& session, nb::module_&) {
    session.def("rms_norm", &rms_norm)
        .def("add_rms_norm", &add_rms_norm)
        .def("layer_norm", &layer_norm, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add_layer_norm", &add_layer_norm, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
             nb::arg())
        .def("match_rms", &match_rms)
        .def("add", &add)
        .def("mul", &mul)
        .def("concat", &concat)
        .def("scale", &scale)
        .def("scale_heads", &scale_heads)
        .def("softcap", &softcap)
        .def("activate", &activate)
        .def("gated", &gated)
        .def("mix", &mix)
        .def("sparsify", &sparsify)
        .def("pool", &pool);
}

}  // namespace elinvar
