// Runs each main kernel of one instruction set once, on one thread, and has callgrind count its
// instructions: benchmarks/instructions.py builds and runs it. The first run of each is not
// counted: it grows buffers.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "inputs.h"
#include "provider.h"

using namespace elinvar;

// In the place of dispatch.cpp: only what valgrind can run is linked.
namespace elinvar {
namespace LEVEL {
extern const Kernels kernels;
}
const Kernels* const* available_kernels(int* count) {
    static const Kernels* const all[] = {&LEVEL::kernels};
    *count = 1;
    return all;
}
}  // namespace elinvar

namespace {

template <class Body>
void count(const std::string& name, const Body& body) {
    body();
    CALLGRIND_ZERO_STATS;
    body();
    CALLGRIND_DUMP_STATS_AT(name.c_str());
    std::puts(name.c_str());
}

std::size_t size(int a, int b = 1, int c = 1) {
    return static_cast<std::size_t>(a) * static_cast<std::size_t>(b) * static_cast<std::size_t>(c);
}

void count_linear(Provider& p) {
    const char* names[] = {"q4", "q5", "q8", "f16", "bf16", "f32"};
    const int k = 576;
    for (const int which : {0, 1, 2, 3, 5})
        for (const int rows : {1, 16}) {
            const auto kind = static_cast<Kind>(which);
            const auto x = floats(size(rows, k));
            std::vector<float> out(size(rows, 192));
            const auto linear = [&](int n) {
                const auto bytes = packed(kind, n, k);
                const Matrix w(kind, n, k, bytes.data(), bytes.size());
                count(std::string("linear ") + names[which] + " " + std::to_string(n) + "x576, " +
                          (rows == 1 ? "1 row" : std::to_string(rows) + " rows"),
                      [&] { p.linear(x.data(), rows, {&w}, out.data()); });
            };
            linear(192);
            // With one panel, rounding the activations is most of the work.
            if (kind == Kind::q8 && rows == 16) linear(16);
        }
    const auto bytes = packed(Kind::q4, 96, k);
    const Matrix w(Kind::q4, 96, k, bytes.data(), bytes.size());
    const auto x = floats(size(16, k));
    std::vector<float> out(size(16, 96));
    count("gated_linear q4 96+96x576, 16 rows",
          [&] { p.gated_linear(x.data(), 16, w, w, 0, out.data()); });
}

void count_norms(Provider& p) {
    const int rows = 16, dim = 576;
    const auto x = floats(size(rows, dim)), y = floats(size(rows, dim)), gain = floats(size(dim));
    std::vector<float> sum(size(rows, dim)), out(size(rows, dim));
    count("rms_norm, 16 rows of 576", [&] {
        p.rms_norm(x.data(), nullptr, gain.data(), 1e-5f, rows, dim, nullptr, out.data());
    });
    count("add_rms_norm, 16 rows of 576", [&] {
        p.rms_norm(x.data(), y.data(), gain.data(), 1e-5f, rows, dim, sum.data(), out.data());
    });
}

// `tokens` queries that end at position `length - 1`, in a cache of f16 or int8.
void count_attention(Provider& p, Kind kind, const std::string& name, int tokens, int length) {
    const int heads = 9, kv_heads = 3, dim = 64, blocks = (length + 31) / 32;
    std::vector<int32_t> tables, starts{0, tokens}, positions, slots;
    for (int b = 0; b < blocks; ++b) tables.push_back((b * 7 + 3) % blocks);
    std::vector<uint16_t> k(size(blocks, kv_heads) * size(static_cast<int>(head_size(kind, dim))));
    std::vector<uint16_t> v(k.size());
    const auto half = [] { return static_cast<uint16_t>((next() & 0x83ff) | 0x3800); };
    for (auto& h : k) h = half();
    for (auto& h : v) h = half();
    const auto qkv = floats(size(tokens, heads + 2 * kv_heads, dim));
    const auto table = floats(size(length, dim));
    std::vector<float> q(size(tokens, heads, dim)), out(q.size());
    for (int t = length - tokens; t < length; ++t) {
        positions.push_back(t);
        slots.push_back(tables[size(t / 32)] * 32 + t % 32);
    }
    const Rope rope{
        qkv.data(), positions.data(), table.data(), slots.data(), nullptr, nullptr, 1e-6f,
        heads,      kv_heads,         dim,          dim,          dim,     kind,    k.data(),
        v.data(),   kv_heads,         q.data()};
    count("rope_write, " + name, [&] { p.rope_write(rope, tokens); });
    const Attention a{q.data(),         k.data(), v.data(), kv_heads,  kind,          heads,
                      kv_heads,         dim,      dim,      dim,       tables.data(), blocks,
                      positions.data(), 0.125f,   0,        out.data()};
    count("attention, " + name, [&] { p.attention(a, 1, starts.data()); });
}

void count_sample(Provider& p) {
    const int vocab = 16384;
    const auto logits = floats(size(vocab), 12.0f);
    int32_t id = 0;
    float logprob = 0;
    const auto sample = [&](const std::string& name, const SampleRow& row) {
        count("sample of 16384, " + name,
              [&] { p.sample(logits.data(), 1, vocab, &row, 0, &id, &logprob, nullptr, nullptr); });
    };
    sample("greedy", {1, 7, 0.0f, 0, 1.0f, 0.0f});
    sample("temperature 1", {1, 7, 1.0f, 0, 1.0f, 0.0f});
    sample("top-k 40, top-p 0.9", {1, 7, 0.8f, 40, 0.9f, 0.0f});
}

}  // namespace

int main() {
    Provider p(1, "");
    count_linear(p);
    count_norms(p);
    count_attention(p, Kind::f16, "1 token after 511", 1, 512);
    count_attention(p, Kind::f16, "32 tokens after 96", 32, 128);
    count_sample(p);
    count_attention(p, Kind::int8, "1 token after 511, int8", 1, 512);
    count_attention(p, Kind::int8, "32 tokens after 96, int8", 32, 128);
    return 0;
}
