// Multi-head latent attention (DeepSeek-AI, 2024): what a token leaves in the cache, and its
// queries. Included inside namespace ELINVAR_ISA, after rows.h.

template <Kind kind>
void latent_write_kind(const Latent& a, int first, int num) {
    using T = Stored<kind>;
    const int dim = a.rank + a.rope_dim;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) T keys[kRun * kMaxHeadDim];
    for (int t = first, run; t < first + num; t += run) {
        run = run_length(a.slots + t, first + num - t);
        const ptrdiff_t block = static_cast<ptrdiff_t>(a.slots[t] / 32) * a.block_step;
        T* k = static_cast<T*>(a.k) + block * head_size(kind, a.padded_dim);
        const int at = a.slots[t] % 32;
        for (int i = 0; i < run; ++i) {
            const float* x = a.x + static_cast<ptrdiff_t>(t + i) * dim;
            const float* angles = a.table + static_cast<ptrdiff_t>(a.positions[t + i]) * a.rope_dim;
            scale_row(x, inverse_rms(x, a.rank, a.eps), a.gain, a.rank, row);
            rotate(x + a.rank, angles, a.rope_dim, row + a.rank);
            to_cache<kind>(row, dim, keys + i * dim, scales_of<kind>(k, a.padded_dim), at + i);
        }
        turn_keys(keys, run, dim, k + at);
    }
}

void latent_write(const Latent& a, int first, int num) {
    const auto write = a.kv_kind == Kind::f32    ? latent_write_kind<Kind::f32>
                       : a.kv_kind == Kind::f16  ? latent_write_kind<Kind::f16>
                       : a.kv_kind == Kind::bf16 ? latent_write_kind<Kind::bf16>
                                                 : latent_write_kind<Kind::int8>;
    write(a, first, num);
}

void latent_rotate(const LatentQuery& a, int first, int num) {
    for (int t = first; t < first + num; ++t) {
        const float* angles = a.table + static_cast<ptrdiff_t>(a.positions[t]) * a.rope_dim;
        for (int h = 0; h < a.heads; ++h) {
            const ptrdiff_t at = static_cast<ptrdiff_t>(t) * a.heads + h;
            rotate(a.q + at * (a.nope_dim + a.rope_dim) + a.nope_dim, angles, a.rope_dim,
                   a.out + at * (a.rank + a.rope_dim) + a.rank);
        }
    }
}
