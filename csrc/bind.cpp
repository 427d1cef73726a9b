// The extension: its provider, recordings, and what is measured of the machine. The other bind_*
// files give the provider its ops.
#include "bind.h"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "ceilings.h"

namespace elinvar {

Kind kind_of(const std::string& name) {
    if (name == "q4") return Kind::q4;
    if (name == "q5") return Kind::q5;
    if (name == "q8") return Kind::q8;
    if (name == "f16") return Kind::f16;
    if (name == "bf16") return Kind::bf16;
    if (name == "f32") return Kind::f32;
    if (name == "int8") return Kind::int8;
    throw std::invalid_argument("unknown kind " + name);
}

namespace {

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

std::vector<std::string> available() {
    int count = 0;
    const Kernels* const* all = available_kernels(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(all[i]->name);
    return names;
}

}  // namespace
}  // namespace elinvar

NB_MODULE(_cpu, m) {
    using namespace elinvar;
    m.def("available", &available);
    m.def("ceilings", &ceilings);
    nb::class_<Recording>(m, "Recording").def("__call__", &replay).def("timed", &replay_timed);
    nb::class_<Session> session(m, "Provider");
    session.def(nb::init<int, const std::string&>())
        .def_prop_ro("simd", &Session::simd)
        .def_prop_ro("num_threads", &Session::num_threads)
        .def("begin_recording", &begin_recording)
        .def("end_recording", &end_recording, nb::arg().none())
        .def("sample", &sample);
    bind_rows(session, m);
    bind_linear(session, m);
    bind_attention(session, m);
    bind_recurrent(session, m);
}
