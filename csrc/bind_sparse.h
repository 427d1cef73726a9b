// The bindings of sparse attention (csrc/sparse.cpp). Included inside bind.cpp's namespace, for its
// helpers.

I32Out index_select(Session& p, F32In q, F32In weights, const BoundCache& kv, I32In query_start,
                    I32In tables, I32In positions, int k, int first) {
    auto out = result<int32_t>(p, {q.shape(0), static_cast<std::size_t>(k)});
    const Index a{q.data(),         weights.data(),
                  kv.k.data(),      kv.block_step,
                  kv.kind,          static_cast<int>(q.shape(1)),
                  kv.dim,           kv.padded_dim,
                  tables.data(),    static_cast<std::ptrdiff_t>(tables.shape(1)),
                  positions.data(), first};
    submit(p,
           [&p, a, k, seqs = static_cast<int>(query_start.size()) - 1, start = query_start.data(),
            o = out.data()] { p.index_select(a, seqs, start, k, o); });
    return out;
}

F32Out sparse_attention(Session& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                        I32In positions, I32In chosen, float scale) {
    auto out = result<float>(p, {q.shape(0), q.shape(1) * static_cast<std::size_t>(kv.value_dim)});
    const Attention a{q.data(),         kv.k.data(),   kv.v.data(),
                      kv.block_step,    kv.kind,       static_cast<int>(q.shape(1)),
                      kv.kv_heads,      kv.dim,        kv.padded_dim,
                      kv.value_dim,     tables.data(), static_cast<std::ptrdiff_t>(tables.shape(1)),
                      positions.data(), scale,         0,
                      out.data()};
    submit(p, [&p, a, seqs = static_cast<int>(query_start.size()) - 1, start = query_start.data(),
               chosen = chosen.data(), k = static_cast<int>(chosen.shape(1))] {
        p.sparse_attention(a, seqs, start, chosen, k);
    });
    return out;
}
