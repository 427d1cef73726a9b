// The one file that knows Python. Arrays cross as pointers, results are NumPy arrays whose
// buffers are reused from step to step; the GIL is released while an op runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>

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

// Freed result buffers by size class: a large step would otherwise fault its pages in anew.
class Buffers {
  public:
    struct Buffer {
        std::size_t size_class;
        Buffer* next;
    };

    void* take(std::size_t bytes) {
        std::size_t c = 8;
        while ((std::size_t{1} << c) < bytes) ++c;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (Buffer* b = free_[c]) {
                free_[c] = b->next;
                return reinterpret_cast<char*>(b) + kHeader;
            }
        }
        void* raw = std::aligned_alloc(64, kHeader + (std::size_t{1} << c));
        if (!raw) throw std::bad_alloc();
        static_cast<Buffer*>(raw)->size_class = c;
        return static_cast<char*>(raw) + kHeader;
    }
    void give(void* p) noexcept {
        auto* b = reinterpret_cast<Buffer*>(static_cast<char*>(p) - kHeader);
        const std::lock_guard<std::mutex> lock(mutex_);
        b->next = free_[b->size_class];
        free_[b->size_class] = b;
    }

  private:
    static constexpr std::size_t kHeader = 64;
    std::mutex mutex_;
    Buffer* free_[64] = {};
};

Buffers& buffers() {
    static Buffers* b = new Buffers;  // outlives every array
    return *b;
}

template <class T>
nb::ndarray<nb::numpy, T> result(std::initializer_list<std::size_t> shape) {
    std::size_t n = 1;
    for (const std::size_t s : shape) n *= s;
    void* p = buffers().take(n * sizeof(T));
    nb::capsule owner(p, [](void* q) noexcept { buffers().give(q); });
    return nb::ndarray<nb::numpy, T>(static_cast<T*>(p), shape, owner);
}

Kind kind_of(const std::string& name) {
    if (name == "q4") return Kind::q4;
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

struct BoundCache {  // K and V arrays of one layer
    AnyIn k, v;
    Kind kind;
    int kv_heads, dim, padded_dim;
    BoundCache(AnyIn k_, AnyIn v_, const std::string& dtype)
        : k(k_),
          v(v_),
          kind(kind_of(dtype)),
          kv_heads(static_cast<int>(k_.shape(1))),
          dim(static_cast<int>(k_.shape(2))),
          padded_dim(static_cast<int>(v_.shape(3))) {}
};

struct Working {  // around an op
    nb::gil_scoped_release release;
    DefaultFloatMode mode;
};

int rows_of(const F32In& x) { return static_cast<int>(x.shape(0)); }
int last_of(const F32In& x) { return static_cast<int>(x.shape(x.ndim() - 1)); }

F32Out embed(Provider& p, I32In ids, const BoundMatrix& w, float scale) {
    auto out = result<float>({ids.size(), static_cast<std::size_t>(w.k)});
    const Working working;
    p.embed(ids.data(), static_cast<int>(ids.size()), w, scale, out.data());
    return out;
}

F32Out rms_norm(Provider& p, F32In x, F32In gain, float eps) {
    auto out = result<float>({x.shape(0), x.shape(1)});
    const Working working;
    p.rms_norm(x.data(), nullptr, gain.data(), eps, rows_of(x), last_of(x), nullptr, out.data());
    return out;
}

nb::tuple add_rms_norm(Provider& p, F32In x, F32In y, F32In gain, float eps) {
    auto sum = result<float>({x.shape(0), x.shape(1)});
    auto out = result<float>({x.shape(0), x.shape(1)});
    {
        const Working working;
        p.rms_norm(x.data(), y.data(), gain.data(), eps, rows_of(x), last_of(x), sum.data(),
                   out.data());
    }
    return nb::make_tuple(sum, out);
}

F32Out add(Provider& p, F32In x, F32In y) {
    auto out = result<float>({x.shape(0), x.shape(1)});
    const Working working;
    p.add(x.data(), y.data(), x.size(), out.data());
    return out;
}

F32Out linear(Provider& p, F32In x, const std::vector<const BoundMatrix*>& ws) {
    std::size_t n = 0;
    std::vector<const Matrix*> matrices;
    for (const BoundMatrix* w : ws) {
        n += static_cast<std::size_t>(w->n);
        matrices.push_back(w);
    }
    auto out = result<float>({x.shape(0), n});
    const Working working;
    p.linear(x.data(), rows_of(x), matrices, out.data());
    return out;
}

F32Out gated_linear(Provider& p, F32In x, const BoundMatrix& gate, const BoundMatrix& up,
                    int activation) {
    auto out = result<float>({x.shape(0), static_cast<std::size_t>(gate.n)});
    const Working working;
    p.gated_linear(x.data(), rows_of(x), gate, up, activation, out.data());
    return out;
}

F32Out rope_write(Provider& p, F32In qkv, I32In positions, F32In table, BoundCache& kv, I32In slots,
                  int heads, std::optional<F32In> q_gain, std::optional<F32In> k_gain, float eps) {
    auto q = result<float>(
        {qkv.shape(0), static_cast<std::size_t>(heads), static_cast<std::size_t>(kv.dim)});
    const Rope a{qkv.data(),
                 positions.data(),
                 table.data(),
                 slots.data(),
                 q_gain ? q_gain->data() : nullptr,
                 k_gain ? k_gain->data() : nullptr,
                 eps,
                 heads,
                 kv.kv_heads,
                 kv.dim,
                 kv.padded_dim,
                 kv.kind,
                 kv.k.data(),
                 kv.v.data(),
                 q.data()};
    const Working working;
    p.rope_write(a, rows_of(qkv));
    return q;
}

F32Out attention(Provider& p, F32In q, const BoundCache& kv, I32In query_start, I32In tables,
                 I32In positions, float scale, int window) {
    auto out = result<float>({q.shape(0), q.shape(1) * q.shape(2)});
    const Attention a{q.data(),
                      kv.k.data(),
                      kv.v.data(),
                      kv.kind,
                      static_cast<int>(q.shape(1)),
                      kv.kv_heads,
                      kv.dim,
                      kv.padded_dim,
                      tables.data(),
                      static_cast<std::ptrdiff_t>(tables.shape(1)),
                      positions.data(),
                      scale,
                      window,
                      out.data()};
    const Working working;
    p.attention(a, static_cast<int>(query_start.size()) - 1, query_start.data());
    return out;
}

nb::tuple sample(Provider& p, F32In logits, nb::ndarray<const uint64_t, nb::c_contig> seeds,
                 I32In positions, F32In temperature, I32In top_k, F32In top_p, F32In min_p,
                 int num_top) {
    const std::size_t rows = logits.shape(0);
    num_top = std::min(num_top, last_of(logits));
    auto ids = result<int32_t>({rows});
    auto logprobs = result<float>({rows});
    auto top_ids = result<int32_t>({rows, static_cast<std::size_t>(num_top)});
    auto top = result<float>({rows, static_cast<std::size_t>(num_top)});
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
    nb::class_<BoundCache>(m, "Cache").def(nb::init<AnyIn, AnyIn, const std::string&>());
    nb::class_<Provider>(m, "Provider")
        .def(nb::init<int, const std::string&>())
        .def_prop_ro("simd", &Provider::simd)
        .def_prop_ro("num_threads", &Provider::num_threads)
        .def("embed", &embed)
        .def("rms_norm", &rms_norm)
        .def("add_rms_norm", &add_rms_norm)
        .def("add", &add)
        .def("linear", &linear)
        .def("gated_linear", &gated_linear)
        .def("rope_write", &rope_write, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg())
        .def("attention", &attention)
        .def("sample", &sample);
}
