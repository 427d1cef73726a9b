// The index of texts behind drafts from what was said before.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <tuple>
#include <utility>

#include "bind.h"
#include "suffixes.h"

namespace elinvar {
namespace {

// Keeps the rows' tokens alive.
struct BoundSuffixes : Suffixes {
    I32In owner;
    BoundSuffixes(I32In token_ids, int most_kept, int most_shared, int most_running)
        : Suffixes(token_ids.data(), token_ids.shape(1), most_kept, most_shared, most_running),
          owner(token_ids) {}
};

using Guess = std::pair<std::vector<int32_t>, std::vector<double>>;

std::vector<Guess> propose(BoundSuffixes& index, const std::vector<std::tuple<int, int, int>>& asks,
                           double least, const std::vector<int32_t>& ahead) {
    std::vector<Guess> guesses;
    for (const auto& [row, num_tokens, most] : asks) {
        Drafts drafts = index.propose(row, num_tokens, ahead, most, least);
        guesses.emplace_back(std::move(drafts.tokens), std::move(drafts.chances));
    }
    return guesses;
}

void begin(BoundSuffixes& index, int row, const nb::bytes& space) {
    index.begin(row, std::string(space.c_str(), space.size()));
}

}  // namespace

void bind_suffixes(nb::module_& m) {
    nb::class_<BoundSuffixes>(m, "Suffixes")
        .def(nb::init<I32In, int, int, int>())
        .def("begin", &begin)
        .def("propose", &propose)
        .def("forget", &BoundSuffixes::forget)
        .def("num_kept", &BoundSuffixes::num_kept)
        .def("num_running", &BoundSuffixes::num_running)
        .def("bytes", &BoundSuffixes::bytes);
}

}  // namespace elinvar
