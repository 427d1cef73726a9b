// What drafts are held against.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bind.h"
#include "chances.h"

namespace elinvar {
namespace {

using Tokens = std::vector<std::vector<int64_t>>;
using Numbers = std::vector<std::vector<double>>;
using Places = std::vector<std::tuple<int, int64_t, int64_t>>;

Behind behind(const Places& places, std::size_t i) {
    const auto& [row, space, token] = places[i];
    return {row, space, token};
}

Numbers of(const Chances& chances, const Places& places, const Tokens& tokens, const Numbers& said,
           double least) {
    Numbers found;
    for (std::size_t i = 0; i < places.size(); ++i)
        found.push_back(chances.of(behind(places, i), tokens.at(i), said.at(i), least));
    return found;
}

void learn(Chances& chances, const Places& places, const Tokens& tokens, const Numbers& said,
           const Tokens& came) {
    for (std::size_t i = 0; i < places.size(); ++i)
        chances.learn(behind(places, i), tokens.at(i), said.at(i), came.at(i));
}

std::vector<int> best(const Numbers& chances, const std::vector<double>& seconds, int rows,
                      double margin, double slow_down) {
    return best_counts(chances, seconds, rows, {margin, slow_down});
}

}  // namespace

void bind_chances(nb::module_& m) {
    nb::class_<Chances>(m, "Chances")
        .def(nb::init<>())
        .def("of", &of)
        .def("expected", &Chances::expected)
        .def("learn", &learn)
        .def("forget", &Chances::forget);
    m.def("best_counts", &best);
}

}  // namespace elinvar
