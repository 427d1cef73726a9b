// Runs every kernel of one instruction set on fixed pseudo-random input and prints a hash of the
// output bits a line. Two instruction sets, compilers or CPUs must print the same lines.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "inputs.h"
#include "provider.h"

using namespace elinvar;

namespace {

uint64_t hash(const void* p, std::size_t bytes) {
    uint64_t h = 14695981039346656037ULL;
    for (std::size_t i = 0; i < bytes; ++i)
        h = (h ^ static_cast<const uint8_t*>(p)[i]) * 1099511628211ULL;
    return h;
}
void show(const char* name, const void* p, std::size_t bytes) {
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash(p, bytes)));
}
void show(const char* name, const std::vector<float>& v) { show(name, v.data(), v.size() * 4); }

// Latent attention: queries, the cache write, scores and values of one array.
void latents(Provider& p) {
    const int heads = 18, nope = 32, rope = 8, rank = 48, dim = rank + rope, padded = 64;
    const int tokens = 70, blocks = 3;
    std::vector<int32_t> positions, tables{2, 0, 1}, starts{0, tokens};
    for (int t = 0; t < tokens; ++t) positions.push_back(t);
    std::vector<int32_t> slots;
    for (const int t : positions)
        slots.push_back(tables[static_cast<std::size_t>(t / 32)] * 32 + t % 32);
    const auto table = floats(tokens * rope), gain = floats(rank);
    const auto weights = floats(tokens * heads);
    const auto x = floats(tokens * dim), in = floats(tokens * heads * (nope + rope));
    for (const Kind kind : {Kind::q8, Kind::bf16}) {
        const int n = heads * rank;
        const auto bytes = packed(kind, n, nope);
        const Matrix w(kind, n, nope, bytes.data(), bytes.size());
        std::vector<float> q(tokens * heads * dim), out(tokens * heads * rank);
        p.latent_query(LatentQuery{in.data(), positions.data(), table.data(), heads, nope, rope,
                                   rank, q.data()},
                       tokens, w);
        show("latent query", q);
        for (const Kind kv : {Kind::f16, Kind::bf16, Kind::f32, Kind::int8}) {
            std::vector<float> cache(blocks * padded * 32);
            p.latent_write(Latent{x.data(), positions.data(), table.data(), slots.data(),
                                  gain.data(), 1e-6f, rank, rope, padded, kv, cache.data(), 1},
                           tokens);
            show("latents", cache);
            const Attention a{q.data(),
                              cache.data(),
                              cache.data(),
                              1,
                              kv,
                              heads,
                              1,
                              dim,
                              padded,
                              rank,
                              tables.data(),
                              blocks,
                              positions.data(),
                              0.2f,
                              0,
                              out.data()};
            p.attention(a, 1, starts.data());
            show("attention over latents", out);
            const Index index{
                q.data(),      weights.data(), cache.data(),    1, kv, heads, dim, padded,
                tables.data(), blocks,         positions.data()};
            std::vector<int32_t> chosen(tokens * 20);
            p.index_select(index, 1, starts.data(), 20, chosen.data());
            show("chosen", chosen.data(), chosen.size() * 4);
            p.sparse_attention(a, 1, starts.data(), chosen.data(), 20);
            show("attention to the chosen", out);
        }
    }
}

// Two sequences go on from one state, one begins.
void recurrent(Provider& p) {
    const int heads = 6, key_heads = 2, key_dim = 40, dim = 24, taps = 4, tokens = 50, blocks = 5;
    const int channels = 2 * key_heads * key_dim + heads * dim, width = channels + 200;
    const std::vector<int32_t> starts{0, 1, 17, tokens}, lens{33, 48, 33};
    const std::vector<int32_t> tables{2, 0, 2, 1, 3, 4};
    const StateTables where{3, starts.data(), lens.data(), tables.data(), 2};
    const auto x = floats(tokens * width, 4.0f), w = floats(taps * channels);
    const auto a_log = floats(heads), shift = floats(heads), gain = floats(dim);
    auto tails = floats(blocks * (taps - 1) * channels);
    std::vector<float> states(blocks * heads * key_dim * 32), qkv(tokens * channels);
    std::vector<float> out(tokens * heads * dim), gated(out.size());
    p.causal_conv(Convolution{x.data(), width, w.data(), tails.data(), (taps - 1) * channels,
                              channels, taps, qkv.data()},
                  where);
    show("convolution", qkv);
    show("tails", tails);
    for (int i = 0; i < 2; ++i)  // the second time from what the first left
        p.delta_rule(
            DeltaRule{qkv.data(), x.data(), width, a_log.data(), shift.data(), states.data(),
                      heads * key_dim * 32, key_heads, heads, key_dim, dim, out.data()},
            where);
    show("delta rule", out);
    show("states", states);
    p.gated_rms_norm(GatedNorm{out.data(), x.data() + channels, width, gain.data(), 1e-6f, heads,
                               dim, gated.data()},
                     tokens);
    show("gated norm", gated);
    p.sigmoid_gate(out.data(), x.data(), out.size(), gated.data());
    show("sigmoid gate", gated);
}

// Rows of three adapters and of none, onto two matrices side by side, of which the last adapter
// changes one and shares its A.
void show_adapters(Provider& p) {
    const int k = 96, n = 83, rows = 70, r = 21;
    for (const Kind kind : {Kind::f16, Kind::bf16, Kind::f32}) {
        const auto a = packed(kind, r, k), b = packed(kind, n, r);
        const Matrix down(kind, r, k, a.data(), a.size()), up(kind, n, r, b.data(), b.size());
        const std::vector<LoraTarget> targets{
            {0, {{&down, &up, 0.3f}, {&down, &up, 2.0f}, {}}},
            {n, {{&down, &up, 0.3f}, {&down, &up, 1.0f}, {&down, &up, 0.7f}}}};
        std::vector<int32_t> adapters;
        for (int t = 0; t < rows; ++t) adapters.push_back(t * 7 % 4 - 1);
        const auto x = floats(rows * k, 3.0f);
        auto y = floats(rows * 2 * n);
        p.lora(x.data(), rows, k, adapters.data(), targets, y.data(), 2 * n);
        show("adapters", y);
        std::vector<float> out(rows * n);
        p.gated(y.data(), rows, n, 0, out.data());
        show("gated", out);
    }
}

// Six experts, one of each kind, of which each token takes two.
void show_mixture(Provider& p) {
    const int n = 96, k = 64, experts = 6, rows = 19;
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<Matrix> matrices;
    matrices.reserve(experts * 2);
    std::vector<const Matrix*> gates, downs;
    for (int e = 0; e < 2 * experts; ++e) {
        const auto kind = static_cast<Kind>(e / 2);
        const int outputs = e % 2 ? k : n, inputs = e % 2 ? n : k;
        bytes.push_back(packed(kind, outputs, inputs));
        matrices.emplace_back(kind, outputs, inputs, bytes.back().data(), bytes.back().size());
        (e % 2 ? downs : gates).push_back(&matrices.back());
    }
    const auto logits = floats(rows * experts, 4.0f), x = floats(rows * k, 3.0f), bias = floats(6);
    std::vector<int32_t> ids(rows * 2);
    std::vector<float> weights(rows * 2), y(rows * k);
    for (const bool sigmoid : {false, true}) {
        const float* b = sigmoid ? bias.data() : nullptr;
        p.route(logits.data(), rows, {experts, 2, sigmoid, true, 2.5f, b, 3, 2}, ids.data(),
                weights.data());
        show("routes", ids.data(), ids.size() * 4);
        show("weights", weights);
        p.moe(x.data(), rows, 2, ids.data(), weights.data(), {gates, gates, downs}, 0, sigmoid,
              y.data());
        show("moe", y);
    }
}

}  // namespace

int main(int argc, char** argv) {
    Provider p(argc > 2 ? std::atoi(argv[2]) : 1, argc > 1 ? argv[1] : "");
    std::fprintf(stderr, "%s\n", p.simd());
    const char* names[] = {"q4", "q5", "q8", "f16", "bf16", "f32"};
    for (int kind = 0; kind < 6; ++kind)
        for (const int rows : {1, 2, 3, 17}) {
            const int n = 83, k = 96;
            const auto bytes = packed(static_cast<Kind>(kind), n, k);
            const Matrix w(static_cast<Kind>(kind), n, k, bytes.data(), bytes.size());
            const auto x = floats(static_cast<std::size_t>(rows * k), 3.0f);
            std::vector<float> y(static_cast<std::size_t>(rows * n));
            p.linear(x.data(), rows, {&w}, y.data());
            show(names[kind], y);
            p.gated_linear(x.data(), rows, w, w, rows % 2, y.data());
            show("gated", y);
            p.linear(x.data(), rows, {&w}, y.data(), floats(n).data());
            show("bias", y);
        }
    show_mixture(p);
    show_adapters(p);
    const auto x = floats(17 * 100), y = floats(17 * 100), gain = floats(100);
    std::vector<float> sum(17 * 100), out(17 * 100);
    p.rms_norm(x.data(), y.data(), gain.data(), 1e-5f, 17, 100, sum.data(), out.data());
    show("norm", out);
    p.layer_norm(x.data(), y.data(), gain.data(), nullptr, 1e-5f, 17, 100, sum.data(), out.data());
    show("layer norm", out);
    p.layer_norm(x.data(), nullptr, gain.data(), y.data(), 1e-5f, 17, 100, nullptr, out.data());
    show("layer norm", out);
    const std::vector<int32_t> starts{0, 1, 1, 17};
    p.pool(x.data(), 100, starts.data(), 3, y.data(), out.data());
    show("pool", out.data(), 300 * 4);
    const auto wide = floats(1700, 9.0f);
    for (const int activation : {0, 1, 2, 3}) {
        p.activate(wide.data(), activation, wide.size(), out.data());
        show("activation", out);
    }
    p.scale(wide.data(), 0.3f, wide.size(), out.data());
    show("scale", out);
    p.softcap(wide.data(), 3.0f, wide.size(), out.data());
    show("softcap", out);
    p.multiply_rows(wide.data(), 17, 100, gain.data(), 0, out.data());
    show("product", out);
    p.sparsify(wide.data(), 1.2f, 17, 100, out.data());
    show("the largest", out);
    p.match_rms(wide.data(), y.data(), 17, 100, out.data());
    show("as large", out);
    std::vector<float> streams(3 * 17 * 100);
    p.mix({wide.data(), x.data(), y.data()}, 17, 100, floats(17 * 9).data(), 3, streams.data());
    show("mixed", streams);
    for (const Kind kv : {Kind::f16, Kind::bf16, Kind::f32, Kind::int8}) {
        const int heads = 6, kv_heads = 2, tokens = 1100, blocks = 35;
        const int dim = kv == Kind::int8 ? 64 : 24, padded = (dim + 15) / 16 * 16;
        const auto qkv = floats(static_cast<std::size_t>(tokens * (heads + 2 * kv_heads) * dim));
        const auto table = floats(static_cast<std::size_t>(tokens * dim));
        std::vector<int32_t> positions, slots, tables;
        for (int b = 0; b < blocks; ++b) tables.push_back((b * 11 + 2) % blocks);
        for (int t = 0; t < tokens; ++t) {
            positions.push_back(t);
            slots.push_back(tables[static_cast<std::size_t>(t / 32)] * 32 + t % 32);
        }
        std::vector<float> cache(static_cast<std::size_t>(blocks * 2 * kv_heads * padded * 32));
        // Only f32 needs all of it; a value's elements are counted in its own size.
        const auto bytes =
            static_cast<std::size_t>(kv_heads * head_size(kv, padded) * cache_bytes(kv));
        uint8_t *k = reinterpret_cast<uint8_t*>(cache.data()), *v = k + bytes;
        std::vector<float> q(static_cast<std::size_t>(tokens * heads * dim)), o(q.size());
        const Rope rope{qkv.data(),
                        positions.data(),
                        table.data(),
                        slots.data(),
                        gain.data(),
                        gain.data(),
                        1e-6f,
                        heads,
                        kv_heads,
                        dim,
                        kv == Kind::bf16 ? 10 : dim,
                        padded,
                        kv,
                        k,
                        v,
                        2 * kv_heads,
                        q.data()};
        Rope whole = rope;
        whole.whole = true;
        whole.q_gain = whole.k_gain = table.data();
        p.rope_write(whole, tokens);
        show("q, one norm over all heads", q);
        p.rope_write(rope, tokens);
        show("q", q);
        show("cache", cache);
        // A piece of a prompt, then few tokens whose splits are items of their own.
        for (const int last : {70, 2}) {
            const int first = tokens - last;
            const std::vector<int32_t> starts{0, last};
            const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(first) * heads * dim;
            Attention a{q.data() + at,
                        k,
                        v,
                        2 * kv_heads,
                        kv,
                        heads,
                        kv_heads,
                        dim,
                        padded,
                        dim,
                        tables.data(),
                        blocks,
                        positions.data() + first,
                        0.2f,
                        kv == Kind::bf16 ? 40 : 0,
                        o.data()};
            p.attention(a, 1, starts.data());
            show("attention", o.data(), static_cast<std::size_t>(last * heads * dim) * 4);
            a.softcap = 1.5f;
            a.sinks = gain.data();
            a.chunk = 1060;
            p.attention(a, 1, starts.data());
            show("switched", o.data(), static_cast<std::size_t>(last * heads * dim) * 4);
            std::vector<float> shares(static_cast<std::size_t>(last * blocks));
            p.block_shares(a, 1, starts.data(), shares.data(), blocks);
            show("shares", shares);
        }
    }
    latents(p);
    recurrent(p);
    const int vocab = 3000, rows = 8;
    const auto logits = floats(static_cast<std::size_t>(vocab * rows), 12.0f);
    std::vector<SampleRow> args;
    for (int i = 0; i < rows; ++i)
        args.push_back({0x123456789abcdefULL * static_cast<uint64_t>(i + 1), i + 3,
                        i ? 0.4f * static_cast<float>(i) : 0.0f, i % 3 ? 0 : 40,
                        i % 2 ? 0.9f : 1.0f, i % 4 ? 0.0f : 0.05f});
    std::vector<int32_t> ids(rows), top_ids(rows * 5);
    std::vector<float> logprobs(rows), top(rows * 5);
    p.sample(logits.data(), rows, vocab, args.data(), 5, ids.data(), logprobs.data(),
             top_ids.data(), top.data());
    show("ids", ids.data(), ids.size() * 4);
    show("logprobs", logprobs);
    show("top", top_ids.data(), top_ids.size() * 4);
    show("top logprobs", top);
    std::vector<int32_t> starts_of_rows, mask_rows, history, biased;
    std::vector<uint32_t> masks;
    for (int i = 0; i <= rows; ++i) starts_of_rows.push_back(i * 40);
    for (int i = 0; i < rows * 40; ++i) {
        history.push_back(i * 7 % 300);
        biased.push_back(i * 13 % vocab);
    }
    for (int i = 0; i < rows / 2 * 94; ++i)
        masks.push_back(0x9E3779B9u * static_cast<uint32_t>(i + 1));
    for (int i = 0; i < rows / 2; ++i) mask_rows.push_back(2 * i);
    const auto biases = floats(rows * 40, 5.0f), penalties = floats(rows);
    const std::vector<int32_t> prompt_lens(rows, 17);
    const std::vector<float> repetition(rows, 1.3f), typical(rows, 0.8f);
    SampleEdits edits;
    edits.typical_p = typical.data();
    edits.history_starts = edits.bias_starts = starts_of_rows.data();
    edits.history = history.data();
    edits.prompt_lens = prompt_lens.data();
    edits.repetition = repetition.data();
    edits.presence = edits.frequency = penalties.data();
    edits.bias_ids = biased.data();
    edits.biases = biases.data();
    edits.mask_rows = mask_rows.data();
    edits.masks = masks.data();
    edits.num_masks = rows / 2;
    p.sample(logits.data(), rows, vocab, args.data(), 5, ids.data(), logprobs.data(),
             top_ids.data(), top.data(), edits);
    show("ids of edited logits", ids.data(), ids.size() * 4);
    return 0;
}
