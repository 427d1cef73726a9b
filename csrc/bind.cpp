// The extension: its provider, recordings, what is measured of the machine, and files. The other
// bind_* files give the provider its ops.
#include "bind.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <tuple>

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

using U32In = nb::ndarray<const uint32_t, nb::c_contig, nb::device::cpu>;
using Penalties = std::tuple<I32In, I32In, I32In, F32In, F32In, F32In>;
using Biases = std::tuple<I32In, I32In, F32In>;

// Edits of rows that are `vocab` wide; the arrays must outlive them.
SampleEdits edits_of(int vocab, const std::optional<F32In>& typical_p,
                     const std::optional<Penalties>& penalties, const std::optional<Biases>& biases,
                     const std::optional<U32In>& masks, const std::optional<I32In>& mask_rows) {
    SampleEdits e;
    e.typical_p = data_of(typical_p);
    if (penalties) {
        const auto& [starts, history, prompt_lens, repetition, presence, frequency] = *penalties;
        e.history_starts = starts.data();
        e.history = history.data();
        e.prompt_lens = prompt_lens.data();
        e.repetition = repetition.data();
        e.presence = presence.data();
        e.frequency = frequency.data();
    }
    if (biases) {
        const auto& [starts, ids, values] = *biases;
        e.bias_starts = starts.data();
        e.bias_ids = ids.data();
        e.biases = values.data();
    }
    if (masks && mask_rows) {
        e.num_masks = static_cast<int>(mask_rows->size());
        const std::size_t words = static_cast<std::size_t>(vocab + 31) / 32;
        if (masks->ndim() != 2 || masks->shape(0) != mask_rows->size() || masks->shape(1) != words)
            throw std::invalid_argument("masks must be [number of mask_rows, words of 32 tokens]");
        e.masks = masks->data();
        e.mask_rows = mask_rows->data();
    }
    return e;
}

nb::tuple sample(Session& p, F32In logits, nb::ndarray<const uint64_t, nb::c_contig> seeds,
                 I32In positions, F32In temperature, I32In top_k, F32In top_p, F32In min_p,
                 std::optional<int> num_logprobs, std::optional<F32In> typical_p,
                 std::optional<Penalties> penalties, std::optional<Biases> biases,
                 std::optional<U32In> masks, std::optional<I32In> mask_rows) {
    const std::size_t rows = logits.shape(0);
    const SampleEdits edits =
        edits_of(last_of(logits), typical_p, penalties, biases, masks, mask_rows);
    const int num_top = std::min(num_logprobs.value_or(0), last_of(logits));
    auto ids = result<int32_t>(p, {rows});
    auto logprobs = result<float>(p, {num_logprobs ? rows : 0});
    auto top_ids = result<int32_t>(p, {rows, static_cast<std::size_t>(num_top)});
    auto top = result<float>(p, {rows, static_cast<std::size_t>(num_top)});
    std::vector<SampleRow> args;
    for (std::size_t i = 0; i < rows; ++i)
        args.push_back({seeds.data()[i], positions.data()[i], temperature.data()[i],
                        top_k.data()[i], top_p.data()[i], min_p.data()[i]});
    {
        const Working working;
        p.sample(logits.data(), rows_of(logits), last_of(logits), args.data(), num_top, ids.data(),
                 num_logprobs ? logprobs.data() : nullptr, top_ids.data(), top.data(), edits);
    }
    return nb::make_tuple(ids, logprobs, top_ids, top);
}

nb::tuple score(Session& p, F32In logits, I32In ids, int num_top) {
    const std::size_t rows = logits.shape(0);
    num_top = std::min(num_top, last_of(logits));
    auto logprobs = result<float>(p, {rows});
    auto top_ids = result<int32_t>(p, {rows, static_cast<std::size_t>(num_top)});
    auto top = result<float>(p, {rows, static_cast<std::size_t>(num_top)});
    {
        const Working working;
        p.score(logits.data(), rows_of(logits), last_of(logits), ids.data(), num_top,
                logprobs.data(), top_ids.data(), top.data());
    }
    return nb::make_tuple(logprobs, top_ids, top);
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

// Whether there is a file of each name: beside a busy thread each of Python's own questions would
// wait for the GIL once more.
std::vector<bool> exist(const std::vector<nb::bytes>& paths) {
    std::vector<std::string> names;
    for (const nb::bytes& path : paths) names.emplace_back(path.c_str(), path.size());
    const nb::gil_scoped_release release;
    std::vector<bool> found;
    for (const std::string& name : names) found.push_back(access(name.c_str(), F_OK) == 0);
    return found;
}

}  // namespace
}  // namespace elinvar

NB_MODULE(_cpu, m) {
    using namespace elinvar;
    using namespace nb::literals;
    m.def("available", &available);
    m.def("ceilings", &ceilings);
    m.def("exist", &exist);
    nb::class_<Recording>(m, "Recording").def("__call__", &replay).def("timed", &replay_timed);
    nb::class_<Session> session(m, "Provider");
    session.def(nb::init<int, const std::string&>())
        .def_prop_ro("simd", &Session::simd)
        .def_prop_ro("num_threads", &Session::num_threads)
        .def("begin_recording", &begin_recording)
        .def("end_recording", &end_recording, nb::arg().none())
        .def("score", &score)
        .def("sample", &sample, "logits"_a, "seeds"_a, "positions"_a, "temperature"_a, "top_k"_a,
             "top_p"_a, "min_p"_a, "num_logprobs"_a.none(), "typical_p"_a = nb::none(),
             "penalties"_a = nb::none(), "biases"_a = nb::none(), "masks"_a = nb::none(),
             "mask_rows"_a = nb::none());
    bind_rows(session, m);
    bind_linear(session, m);
    bind_attention(session, m);
    bind_recurrent(session, m);
    bind_suffixes(m);
    bind_chances(m);
}
