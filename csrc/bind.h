// What the files that know Python share. Arrays cross as pointers, results are NumPy arrays whose
// buffers are reused from step to step; the GIL is released while an op runs.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "float_env.h"
#include "provider.h"

namespace elinvar {

namespace nb = nanobind;

using F32In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using I32In = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using U8In = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
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

// Each binds the ops of one file, and the classes that they alone take.
void bind_rows(nb::class_<Session>& session, nb::module_& m);
void bind_linear(nb::class_<Session>& session, nb::module_& m);
void bind_attention(nb::class_<Session>& session, nb::module_& m);
void bind_recurrent(nb::class_<Session>& session, nb::module_& m);
void bind_suffixes(nb::module_& m);
void bind_chances(nb::module_& m);

Kind kind_of(const std::string& name);

struct BoundMatrix : Matrix {  // keeps the packed bytes alive
    U8In owner;
    BoundMatrix(const std::string& kind, int n, int k, U8In data)
        : Matrix(kind_of(kind), n, k, data.data(), data.size()), owner(data) {}
};

inline int rows_of(const F32In& x) { return static_cast<int>(x.shape(0)); }
inline int last_of(const F32In& x) { return static_cast<int>(x.shape(x.ndim() - 1)); }
inline const float* data_of(const std::optional<F32In>& x) { return x ? x->data() : nullptr; }

template <class T>
nb::ndarray<nb::numpy, T> result(const Session& p, std::initializer_list<std::size_t> shape) {
    std::size_t n = 1;
    for (const std::size_t s : shape) n *= s;
    void* data = Arena::take(p.recording ? p.workspace : Arena::common(), n * sizeof(T));
    nb::capsule owner(data, [](void* q) noexcept { Arena::give(q); });
    return nb::ndarray<nb::numpy, T>(static_cast<T*>(data), shape, owner);
}

// A result of the shape of x [T, D].
inline F32Out like(const Session& p, const F32In& x) {
    return result<float>(p, {x.shape(0), x.shape(1)});
}

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

// For an array that its owner may replace by a larger one before a replay.
inline void keep(Session& p, const F32In& x) {
    if (p.recording) p.recording->keep.push_back(nb::cast(x));
}

}  // namespace elinvar
