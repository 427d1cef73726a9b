// The one file that knows Python. Arrays cross as pointers, results are NumPy arrays whose
// buffers are reused from step to step; the GIL is released while an op runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "ceilings.h"
#include "float_env.h"
#include "provider.h"

namespace nb = nanobind;
using namespace elinvar;

namespace {

using F32In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using I32In = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using AnyIn = nb::ndarray<nb::c_contig, nb::device::cpu>;
using F32Out = nb::ndarray<nb::numpy, float>;
using I32Out = nb::ndarray<nb::numpy, int32_t>;

// Ops in order, with their arguments, done again by one call. Results lie in the provider's
// workspace, shared by all its recordings: only one runs at a time.
struct Recording {
    std::vector<std::function<void()>> ops;
    std::vector<nb::object> keep;
    std::shared_ptr<Arena> workspace;
    float* out = nullptr;
    std::vector<std::size_t> shape;
};

// A provider, and what it is recording, if anything.
struct Session : Provider {
    using Provider::Provider;
    std::shared_ptr<Arena> workspace = std::make_shared<Arena>();
    std::shared_ptr<Recording> recording;
};

template <class T>
nb::ndarray<nb::numpy, T> result(const Session& p, std::initializer_list<std::size_t> shape) {
    std::size_t n = 1;
    for (const std::size_t s : shape) n *= s;
    void* data = Arena::take(p.recording ? p.workspace : Arena::common(), n * sizeof(T));
    nb::capsule owner(data, [](void* q) noexcept { Arena::give(q); });
    return nb::ndarray<nb::numpy, T>(static_cast<T*>(data), shape, owner);
}

Kind kind_of(const std::string& name) {
    if (name == "q4") return Kind::q4;
    if (name == "q5") return Kind::q5;
    if (name == "q8") return Kind::q8;
    if (name == "f16") return Kind::f16;
    if (name == "bf16") return Kind::bf16;
    if (name == "f32") return Kind::f32;
    throw std::invalid_argument("unknown kind " + name);
}

struct BoundMatrix : Matrix {  // keeps the packed bytes alive
    nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu> owner;
    BoundMatrix(const std::string& kind, int n, int k,
                nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu> data)
        : Matrix(kind_of(kind), n, k, data.data(), data.size()), owner(data) {}
};

const float* data_of(const std::optional<F32In>& x) { return x ? x->data() : nullptr; }

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

struct BoundCache {  // K and V of one layer: views of a cache in which all layers lie
    using Strided = nb::ndarray<nb::device::cpu>;
    Strided k, v;
    Kind kind;
    int kv_heads, dim, padded_dim, value_dim, block_step;
    BoundCache(Strided k_, Strided v_, const std::string& dtype)
        : k(k_),
          v(v_),
          kind(kind_of(dtype)),
          kv_heads(static_cast<int>(k_.shape(1))),
          dim(static_cast<int>(k_.shape(2))),
          padded_dim((dim + 15) / 16 * 16),
          value_dim(std::min(dim, static_cast<int>(v_.shape(3)))),
          block_step(static_cast<int>(k_.stride(0) / k_.stride(1))) {
        if (k_.stride(3) != 1 || v_.stride(latent() ? 2 : 3) != 1 || k_.stride(0) != v_.stride(0) ||
            k_.stride(1) != v_.stride(1) || k_.stride(1) != std::int64_t{padded_dim} * 32)
            throw std::invalid_argument("K and V do not lie as ops/api.py makes them");
    }
    bool latent() const { return k.data() == v.data(); }  // the values are those of the keys
};

struct Working {  // around an op
    nb::gil_scoped_release release;
    DefaultFloatMode mode;
};

// Does the work now, or keeps it for every replay: then `body` owns nothing but what
// Recording::keep was given, and its pointers are to arrays that outlive the recording.
template <class Body>
void submit(Session& p, const Body& body) {
    if (p.recording) {
        p.recording->ops.emplace_back(body);
    } else {
        const Working working;
        body();
    }
}

int rows_of(const F32In& x) { return static_cast<int>(x.shape(0)); }
int last_of(const F32In& x) { return static_cast<int>(x.shape(x.ndim() - 1)); }

F32Out embed(Session& p, I32In ids, const BoundMatrix& w, float scale) {
    auto out = result<float>(p, {ids.size(), static_cast<std::size_t>(w.k)});
    submit(p, [&p, &w, scale, i = ids.data(), n = static_cast<int>(ids.size()), o = out.data()] {
        p.embed(i, n, w, scale, o);
    });
    return out;
}

F32Out rms_norm(Session& p, F32In x, F32In gain, float eps) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, x = x.data(), gain = gain.data(), eps, rows = rows_of(x), dim = last_of(x),
               o = out.data()] { p.rms_norm(x, nullptr, gain, eps, rows, dim, nullptr, o); });
    return out;
}

nb::tuple add_rms_norm(Session& p, F32In x, F32In y, F32In gain, float eps) {
    auto sum = result<float>(p, {x.shape(0), x.shape(1)});
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, x = x.data(), y = y.data(), gain = gain.data(), eps, rows = rows_of(x),
               dim = last_of(x), s = sum.data(),
               o = out.data()] { p.rms_norm(x, y, gain, eps, rows, dim, s, o); });
    return nb::make_tuple(sum, out);
}

F32Out add(Session& p, F32In x, F32In y) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p,
           [&p, x = x.data(), y = y.data(), n = x.size(), o = out.data()] { p.add(x, y, n, o); });
    return out;
}

F32Out concat(Session& p, F32In x, F32In y) {
    auto out = result<float>(p, {x.shape(0), x.shape(1) + y.shape(1)});
    submit(p, [&p, x = x.data(), y = y.data(), rows = rows_of(x), dx = last_of(x), dy = last_of(y),
               o = out.data()] { p.concat(x, dx, y, dy, rows, o); });
    return out;
}

F32Out layer_norm(Session& p, F32In x, F32In gain, std::optional<F32In> bias, float eps) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, x = x.data(), gain = gain.data(), bias = data_of(bias), eps, rows = rows_of(x),
               dim = last_of(x), o = out.data()] {
        p.layer_norm(x, nullptr, gain, bias, eps, rows, dim, nullptr, o);
    });
    return out;
}

nb::tuple add_layer_norm(Session& p, F32In x, F32In y, F32In gain, std::optional<F32In> bias,
                         float eps) {
    auto sum = result<float>(p, {x.shape(0), x.shape(1)});
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, x = x.data(), y = y.data(), gain = gain.data(), bias = data_of(bias), eps,
               rows = rows_of(x), dim = last_of(x), s = sum.data(),
               o = out.data()] { p.layer_norm(x, y, gain, bias, eps, rows, dim, s, o); });
    return nb::make_tuple(sum, out);
}

F32Out activate(Session& p, F32In x, int activation) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, activation, x = x.data(), n = x.size(), o = out.data()] {
        p.activate(x, activation, n, o);
    });
    return out;
}

F32Out scale(Session& p, F32In x, float factor) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p,
           [&p, factor, x = x.data(), n = x.size(), o = out.data()] { p.scale(x, factor, n, o); });
    return out;
}

F32Out scale_heads(Session& p, F32In q, I32In positions, F32In factors) {
    auto out = result<float>(p, {q.shape(0), q.shape(1), q.shape(2)});
    if (p.recording) p.recording->keep.push_back(nb::cast(factors));  // they may grow elsewhere
    submit(p, [&p, q = q.data(), rows = rows_of(q),
               width = static_cast<int>(q.shape(1) * q.shape(2)), at = positions.data(),
               f = factors.data(), o = out.data()] { p.scale_heads(q, rows, width, at, f, o); });
    return out;
}

F32Out softcap(Session& p, F32In x, float cap) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, cap, x = x.data(), n = x.size(), o = out.data()] { p.softcap(x, cap, n, o); });
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

F32Out gated(Session& p, F32In x, int activation) {
    auto out = result<float>(p, {x.shape(0), x.shape(1) / 2});
    submit(p, [&p, activation, x = x.data(), rows = rows_of(x), cols = last_of(x) / 2,
               o = out.data()] { p.gated(x, rows, cols, activation, o); });
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

nb::tuple route(Session& p, F32In logits, int top_k, bool sigmoid, bool renormalise, float scaling,
                std::optional<F32In> bias, int num_groups, int top_groups) {
    const auto k = static_cast<std::size_t>(top_k);
    auto ids = result<int32_t>(p, {logits.shape(0), k});
    auto weights = result<float>(p, {logits.shape(0), k});
    const Route a{last_of(logits), top_k,     sigmoid,
                  renormalise,     scaling,   bias ? bias->data() : nullptr,
                  num_groups,      top_groups};
    submit(p, [&p, a, x = logits.data(), rows = rows_of(logits), ids = ids.data(),
               weights = weights.data()] { p.route(x, rows, a, ids, weights); });
    return nb::make_tuple(ids, weights);
}

F32Out moe(Session& p, F32In x, I32In ids, F32In weights, const BoundExperts& experts,
           int activation, bool scale_inputs) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p,
           [&p, &experts, activation, scale_inputs, x = x.data(), rows = rows_of(x),
            top_k = last_of(weights), ids = ids.data(), weights = weights.data(), o = out.data()] {
               p.moe(x, rows, top_k, ids, weights, experts, activation, scale_inputs, o);
           });
    return out;
}

F32Out rope_write(Session& p, F32In qkv, I32In positions, F32In table, BoundCache& kv, I32In slots,
                  int heads, std::optional<F32In> q_gain, std::optional<F32In> k_gain, float eps,
                  std::optional<F32In> v_gain) {
    auto q = result<float>(
        p, {qkv.shape(0), static_cast<std::size_t>(heads), static_cast<std::size_t>(kv.dim)});
    const auto of_all = [&](const std::optional<F32In>& gain) {
        return gain && last_of(*gain) > kv.dim;
    };
    const Rope a{qkv.data(),
                 positions.data(),
                 table.data(),
                 slots.data(),
                 data_of(q_gain),
                 data_of(k_gain),
                 eps,
                 heads,
                 kv.kv_heads,
                 kv.dim,
                 last_of(table),
                 kv.padded_dim,
                 kv.kind,
                 kv.k.data(),
                 kv.latent() ? nullptr : kv.v.data(),
                 kv.block_step,
                 q.data(),
                 of_all(q_gain) || of_all(k_gain),
                 data_of(v_gain)};
    if (p.recording) p.recording->keep.push_back(nb::cast(table));  // it may grow elsewhere
    submit(p, [&p, a, rows = rows_of(qkv)] { p.rope_write(a, rows); });
    return q;
}

F32Out rope_queries(Session& p, F32In q, I32In positions, F32In table, int heads, F32In gain,
                    float eps) {
    const auto count = static_cast<std::size_t>(heads);
    auto out = result<float>(p, {q.shape(0), count, q.shape(1) / count});
    Rope a{};
    a.qkv = q.data();
    a.positions = positions.data();
    a.table = table.data();
    a.q_gain = gain.data();
    a.eps = eps;
    a.heads = heads;
    a.dim = last_of(q) / heads;
    a.rotary_dim = last_of(table);
    a.q = out.data();
    if (p.recording) p.recording->keep.push_back(nb::cast(table));
    submit(p, [&p, a, rows = rows_of(q)] { p.rope_queries(a, rows); });
    return out;
}

F32Out mul(Session& p, F32In x, F32In y, int start) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    const std::ptrdiff_t step = y.shape(0) == 1 ? 0 : last_of(y);
    submit(p, [&p, step, x = x.data(), rows = rows_of(x), dim = last_of(x), y = y.data() + start,
               o = out.data()] { p.multiply_rows(x, rows, dim, y, step, o); });
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
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, deviations, x = x.data(), rows = rows_of(x), dim = last_of(x), o = out.data()] {
        p.sparsify(x, deviations, rows, dim, o);
    });
    return out;
}

F32Out match_rms(Session& p, F32In x, F32In y) {
    auto out = result<float>(p, {x.shape(0), x.shape(1)});
    submit(p, [&p, x = x.data(), y = y.data(), rows = rows_of(x), dim = last_of(x),
               o = out.data()] { p.match_rms(x, y, rows, dim, o); });
    return out;
}

F32Out head_linear(Session& p, F32In x, const BoundMatrix& w, int heads) {
    auto out = result<float>(p, {x.shape(0), static_cast<std::size_t>(w.n)});
    submit(p, [&p, &w, heads, x = x.data(), rows = rows_of(x), o = out.data()] {
        p.head_linear(x, w.k, rows, w, heads, o, w.n / heads);
    });
    return out;
}

F32Out latent_query(Session& p, F32In q, const BoundMatrix& w, I32In positions, F32In table,
                    int heads) {
    const int rope_dim = last_of(q) / heads - w.k, rank = w.n / heads;
    auto out = result<float>(p, {q.shape(0), static_cast<std::size_t>(heads),
                                 static_cast<std::size_t>(rank + rope_dim)});
    const LatentQuery a{q.data(), positions.data(), table.data(), heads,
                        w.k,      rope_dim,         rank,         out.data()};
    if (p.recording) p.recording->keep.push_back(nb::cast(table));
    submit(p, [&p, &w, a, rows = rows_of(q)] { p.latent_query(a, rows, w); });
    return out;
}

void latent_write(Session& p, F32In x, I32In positions, F32In table, BoundCache& kv, I32In slots,
                  F32In gain, float eps) {
    const Latent a{x.data(),    positions.data(), table.data(),          slots.data(),  gain.data(),
                   eps,         kv.value_dim,     kv.dim - kv.value_dim, kv.padded_dim, kv.kind,
                   kv.k.data(), kv.block_step};
    if (p.recording) p.recording->keep.push_back(nb::cast(table));
    submit(p, [&p, a, rows = rows_of(x)] { p.latent_write(a, rows); });
}

F32Out attention(Session& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                 I32In positions, float scale, int window, float softcap,
                 std::optional<F32In> sinks, int chunk, int first) {
    auto out = result<float>(p, {q.shape(0), q.shape(1) * static_cast<std::size_t>(kv.value_dim)});
    const Attention a{q.data(),
                      kv.k.data(),
                      kv.v.data(),
                      kv.block_step,
                      kv.kind,
                      static_cast<int>(q.shape(1)),
                      kv.kv_heads,
                      kv.dim,
                      kv.padded_dim,
                      kv.value_dim,
                      tables.data(),
                      static_cast<std::ptrdiff_t>(tables.shape(1)),
                      positions.data(),
                      scale,
                      window,
                      out.data(),
                      softcap,
                      sinks ? sinks->data() : nullptr,
                      chunk,
                      first};
    submit(p, [&p, a, seqs = static_cast<int>(query_start.size()) - 1, start = query_start.data()] {
        p.attention(a, seqs, start);
    });
    return out;
}

#include "bind_recurrent.h"
#include "bind_sparse.h"

F32Out pool(Session& p, F32In x, I32In starts, F32In weights) {
    const std::size_t seqs = starts.size() - 1;
    auto out = result<float>(p, {seqs, x.shape(1)});
    submit(p, [&p, x = x.data(), dim = last_of(x), starts = starts.data(),
               seqs = static_cast<int>(seqs), weights = weights.data(),
               o = out.data()] { p.pool(x, dim, starts, seqs, weights, o); });
    return out;
}

nb::tuple sample(Session& p, F32In logits, nb::ndarray<const uint64_t, nb::c_contig> seeds,
                 I32In positions, F32In temperature, I32In top_k, F32In top_p, F32In min_p,
                 int num_top) {
    const std::size_t rows = logits.shape(0);
    num_top = std::min(num_top, last_of(logits));
    auto ids = result<int32_t>(p, {rows});
    auto logprobs = result<float>(p, {rows});
    auto top_ids = result<int32_t>(p, {rows, static_cast<std::size_t>(num_top)});
    auto top = result<float>(p, {rows, static_cast<std::size_t>(num_top)});
    std::vector<SampleRow> args;
    for (std::size_t i = 0; i < rows; ++i)
        args.push_back({seeds.data()[i], positions.data()[i], temperature.data()[i],
                        top_k.data()[i], top_p.data()[i], min_p.data()[i]});
    {
        const Working working;
        p.sample(logits.data(), rows_of(logits), last_of(logits), args.data(), num_top, ids.data(),
                 logprobs.data(), top_ids.data(), top.data());
    }
    return nb::make_tuple(ids, logprobs, top_ids, top);
}

void begin_recording(Session& p) {
    p.recording = std::make_shared<Recording>();
    p.recording->workspace = p.workspace;
}

// `out`: what replay() will return.
std::shared_ptr<Recording> end_recording(Session& p, std::optional<F32In> out) {
    auto done = std::move(p.recording);
    p.recording.reset();
    if (!out) return nullptr;
    done->out = const_cast<float*>(out->data());
    for (std::size_t i = 0; i < out->ndim(); ++i) done->shape.push_back(out->shape(i));
    return done;
}

F32Out result_of(const std::shared_ptr<Recording>& r) {
    auto* held = new std::shared_ptr<Recording>(r);
    nb::capsule owner(held,
                      [](void* p) noexcept { delete static_cast<std::shared_ptr<Recording>*>(p); });
    return F32Out(r->out, r->shape.size(), r->shape.data(), owner);
}

F32Out replay(std::shared_ptr<Recording> r) {
    {
        const Working working;
        for (const auto& op : r->ops) op();
    }
    return result_of(r);
}

// As replay, with the clock's nanoseconds before the first op and after each one.
nb::tuple replay_timed(std::shared_ptr<Recording> r) {
    const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch(); };
    std::vector<int64_t> times;
    {
        const Working working;
        times.reserve(r->ops.size() + 1);
        times.push_back(std::chrono::nanoseconds(now()).count());
        for (const auto& op : r->ops) {
            op();
            times.push_back(std::chrono::nanoseconds(now()).count());
        }
    }
    return nb::make_tuple(result_of(r), times);
}

nb::dict ceilings(int num_threads, const std::string& simd) {
    Ceilings c;
    {
        const nb::gil_scoped_release release;
        c = measure_ceilings(num_threads, simd);
    }
    nb::dict found;
    found["cache_bytes"] = c.cache_bytes;
    found["read"] = c.read;
    found["read_cached"] = c.read_cached;
    found["fma"] = c.fma;
    found["maddubs"] = c.maddubs;
    found["dot"] = c.dot;
    return found;
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("available", [] {
        int count = 0;
        const Kernels* const* all = available_kernels(&count);
        std::vector<std::string> names;
        for (int i = 0; i < count; ++i) names.emplace_back(all[i]->name);
        return names;
    });
    m.def("ceilings", &ceilings);
    nb::class_<BoundMatrix>(m, "Matrix")
        .def(nb::init<const std::string&, int, int,
                      nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>>());
    nb::class_<BoundExperts>(m, "Experts")
        .def(nb::init<const BoundExperts::Matrices&, const BoundExperts::Matrices&,
                      const BoundExperts::Matrices&, const BoundExperts::Bias&,
                      const BoundExperts::Bias&, const BoundExperts::Bias&>(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    nb::class_<BoundLora>(m, "Lora")
        .def(nb::init<const std::vector<int>&, std::size_t>())
        .def("set", &BoundLora::set);
    nb::class_<BoundCache>(m, "Cache")
        .def(nb::init<BoundCache::Strided, BoundCache::Strided, const std::string&>());
    nb::class_<Recording>(m, "Recording").def("__call__", &replay).def("timed", &replay_timed);
    nb::class_<BoundState>(m, "State")
        .def(nb::init<BoundState::Strided, BoundState::Strided, int, int>());
    nb::class_<Session>(m, "Provider")
        .def(nb::init<int, const std::string&>())
        .def_prop_ro("simd", &Session::simd)
        .def_prop_ro("num_threads", &Session::num_threads)
        .def("begin_recording", &begin_recording)
        .def("end_recording", &end_recording, nb::arg().none())
        .def("embed", &embed)
        .def("rms_norm", &rms_norm)
        .def("add_rms_norm", &add_rms_norm)
        .def("add", &add)
        .def("concat", &concat)
        .def("layer_norm", &layer_norm, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add_layer_norm", &add_layer_norm, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
             nb::arg())
        .def("activate", &activate)
        .def("scale", &scale)
        .def("scale_heads", &scale_heads)
        .def("softcap", &softcap)
        .def("linear", &linear, nb::arg(), nb::arg(), nb::arg().none())
        .def("gated_linear", &gated_linear)
        .def("gated", &gated)
        .def("lora", &lora)
        .def("route", &route, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().none(), nb::arg(), nb::arg())
        .def("moe", &moe)
        .def("rope_write", &rope_write, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none())
        .def("rope_queries", &rope_queries)
        .def("mul", &mul)
        .def("mix", &mix)
        .def("sparsify", &sparsify)
        .def("match_rms", &match_rms)
        .def("head_linear", &head_linear)
        .def("latent_query", &latent_query)
        .def("latent_write", &latent_write)
        .def("attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg())
        .def("index_select", &index_select)
        .def("sparse_attention", &sparse_attention)
        .def("causal_conv", &causal_conv)
        .def("delta_rule", &delta_rule)
        .def("gated_rms_norm", &gated_rms_norm)
        .def("sigmoid_gate", &sigmoid_gate)
        .def("pool", &pool)
        .def("sample", &sample);
}
