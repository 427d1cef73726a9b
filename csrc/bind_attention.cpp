// Ops on keys and values: rotation, the cache, attention to it.
#include <algorithm>
#include <stdexcept>

#include "bind.h"

namespace elinvar {
namespace {

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
            k_.stride(1) != v_.stride(1) || k_.stride(1) != head_size(kind, padded_dim))
            throw std::invalid_argument("K and V do not lie as ops/caches.py makes them");
    }
    bool latent() const { return k.data() == v.data(); }  // the values are those of the keys
};

F32Out rope_write(Session& p, F32In qkv, I32In positions, F32In table, BoundCache& kv, I32In slots,
                  int heads, std::optional<F32In> q_gain, std::optional<F32In> k_gain, float eps,
                  std::optional<F32In> v_gain) {
    auto q = result<float>(
        p, {qkv.shape(0), static_cast<std::size_t>(heads), static_cast<std::size_t>(kv.dim)});
    const auto of_all = [&](const std::optional<F32In>& gain) {
        return gain && last_of(*gain) > kv.dim;
    };
    const Rope a{.qkv = qkv.data(),
                 .positions = positions.data(),
                 .table = table.data(),
                 .slots = slots.data(),
                 .q_gain = data_of(q_gain),
                 .k_gain = data_of(k_gain),
                 .eps = eps,
                 .heads = heads,
                 .kv_heads = kv.kv_heads,
                 .dim = kv.dim,
                 .rotary_dim = last_of(table),
                 .padded_dim = kv.padded_dim,
                 .kv_kind = kv.kind,
                 .k = kv.k.data(),
                 .v = kv.latent() ? nullptr : kv.v.data(),
                 .block_step = kv.block_step,
                 .q = q.data(),
                 .whole = of_all(q_gain) || of_all(k_gain),
                 .v_gain = data_of(v_gain)};
    keep(p, table);
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
    keep(p, table);
    submit(p, [&p, a, rows = rows_of(q)] { p.rope_queries(a, rows); });
    return out;
}

F32Out latent_query(Session& p, F32In q, const BoundMatrix& w, I32In positions, F32In table,
                    int heads) {
    const int rope_dim = last_of(q) / heads - w.k, rank = w.n / heads;
    auto out = result<float>(p, {q.shape(0), static_cast<std::size_t>(heads),
                                 static_cast<std::size_t>(rank + rope_dim)});
    const LatentQuery a{.q = q.data(),
                        .positions = positions.data(),
                        .table = table.data(),
                        .heads = heads,
                        .nope_dim = w.k,
                        .rope_dim = rope_dim,
                        .rank = rank,
                        .out = out.data()};
    keep(p, table);
    submit(p, [&p, &w, a, rows = rows_of(q)] { p.latent_query(a, rows, w); });
    return out;
}

void latent_write(Session& p, F32In x, I32In positions, F32In table, BoundCache& kv, I32In slots,
                  F32In gain, float eps) {
    const Latent a{.x = x.data(),
                   .positions = positions.data(),
                   .table = table.data(),
                   .slots = slots.data(),
                   .gain = gain.data(),
                   .eps = eps,
                   .rank = kv.value_dim,
                   .rope_dim = kv.dim - kv.value_dim,
                   .padded_dim = kv.padded_dim,
                   .kv_kind = kv.kind,
                   .k = kv.k.data(),
                   .block_step = kv.block_step};
    keep(p, table);
    submit(p, [&p, a, rows = rows_of(x)] { p.latent_write(a, rows); });
}

int seqs_of(const I32In& query_start) { return static_cast<int>(query_start.size()) - 1; }

std::ptrdiff_t step_of(const I32In& tables) { return static_cast<std::ptrdiff_t>(tables.shape(1)); }

F32Out values_like(const Session& p, const F32In& q, const BoundCache& kv) {
    return result<float>(p, {q.shape(0), q.shape(1) * static_cast<std::size_t>(kv.value_dim)});
}

// Attention to all keys of the tables.
Attention to_all(const BoundCache& kv, const F32In& q, const I32In& tables, const I32In& positions,
                 float scale, float* out) {
    return {.q = q.data(),
            .k = kv.k.data(),
            .v = kv.v.data(),
            .block_step = kv.block_step,
            .kv_kind = kv.kind,
            .heads = static_cast<int>(q.shape(1)),
            .kv_heads = kv.kv_heads,
            .dim = kv.dim,
            .padded_dim = kv.padded_dim,
            .value_dim = kv.value_dim,
            .tables = tables.data(),
            .table_stride = step_of(tables),
            .positions = positions.data(),
            .scale = scale,
            .window = 0,
            .out = out};
}

F32Out attention(Session& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                 I32In positions, float scale, int window, float softcap,
                 std::optional<F32In> sinks, int chunk, int first) {
    auto out = values_like(p, q, kv);
    Attention a = to_all(kv, q, tables, positions, scale, out.data());
    a.window = window;
    a.softcap = softcap;
    a.sinks = data_of(sinks);
    a.chunk = chunk;
    a.first = first;
    submit(p, [&p, a, seqs = seqs_of(query_start), start = query_start.data()] {
        p.attention(a, seqs, start);
    });
    return out;
}

void block_shares(Session& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                  I32In positions, float scale, nb::ndarray<float, nb::c_contig, nb::device::cpu> y,
                  float softcap, std::optional<F32In> sinks) {
    Attention a = to_all(kv, q, tables, positions, scale, nullptr);
    a.softcap = softcap;
    a.sinks = data_of(sinks);
    submit(p, [&p, a, seqs = seqs_of(query_start), start = query_start.data(), y = y.data(),
               stride = static_cast<std::ptrdiff_t>(y.shape(1))] {
        p.block_shares(a, seqs, start, y, stride);
    });
}

I32Out index_select(Session& p, F32In q, F32In weights, const BoundCache& kv, I32In query_start,
                    I32In tables, I32In positions, int k, int first) {
    auto out = result<int32_t>(p, {q.shape(0), static_cast<std::size_t>(k)});
    const Index a{.q = q.data(),
                  .weights = weights.data(),
                  .k = kv.k.data(),
                  .block_step = kv.block_step,
                  .kv_kind = kv.kind,
                  .heads = static_cast<int>(q.shape(1)),
                  .dim = kv.dim,
                  .padded_dim = kv.padded_dim,
                  .tables = tables.data(),
                  .table_stride = step_of(tables),
                  .positions = positions.data(),
                  .first = first};
    submit(p, [&p, a, k, seqs = seqs_of(query_start), start = query_start.data(), o = out.data()] {
        p.index_select(a, seqs, start, k, o);
    });
    return out;
}

F32Out sparse_attention(Session& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                        I32In positions, I32In chosen, float scale) {
    auto out = values_like(p, q, kv);
    const Attention a = to_all(kv, q, tables, positions, scale, out.data());
    submit(p, [&p, a, seqs = seqs_of(query_start), start = query_start.data(),
               chosen = chosen.data(), k = static_cast<int>(chosen.shape(1))] {
        p.sparse_attention(a, seqs, start, chosen, k);
    });
    return out;
}

}  // namespace

void bind_attention(nb::class_<Session>& session, nb::module_& m) {
    nb::class_<BoundCache>(m, "Cache")
        .def(nb::init<BoundCache::Strided, BoundCache::Strided, const std::string&>());
    session
        .def("rope_write", &rope_write, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none())
        .def("rope_queries", &rope_queries)
        .def("latent_query", &latent_query)
        .def("latent_write", &latent_write)
        .def("attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg())
        .def("block_shares", &block_shares, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def("index_select", &index_select)
        .def("sparse_attention", &sparse_attention);
}

}  // namespace elinvar
