// What drafts are held against.
#include "bind.h"
#include "chances.h"

namespace elinvar {
namespace {

using Tokens = std::vector<int64_t>;
using Numbers = std::vector<double>;

Numbers of(const Chances& chances, int row, int64_t space, int64_t last, const Tokens& tokens,
           const Numbers& said, double least) {
    return chances.of({row, space, last}, tokens, said, least);
}

void learn(Chances& chances, int row, int64_t space, int64_t last, const Tokens& tokens,
           const Numbers& said, const Tokens& came) {
    chances.learn({row, space, last}, tokens, said, came);
}

}  // namespace

void bind_chances(nb::module_& m) {
    nb::class_<Chances>(m, "Chances")
        .def(nb::init<>())
        .def("of", &of)
        .def("expected", &Chances::expected)
        .def("learn", &learn)
        .def("forget", &Chances::forget);
}

}  // namespace elinvar
