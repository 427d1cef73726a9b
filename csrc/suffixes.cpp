// Chains of equal grams, as compressors of the LZ77 kind search their window (Ziv and Lempel,
// 1977).
#include "suffixes.h"

#include <algorithm>
#include <utility>

namespace elinvar {
namespace {

constexpr std::size_t kFewest = 64;  // slots of a table

// That a token comes on which this share of the matches agrees, of so many tokens with those
// guessed. As it was in recorded answers (benchmarks/speculation.py --offline): of those that all
// matches of 1, 2, 4, 10, 30 tokens agreed in, 0.4, 0.5, 0.8, 0.9, 0.98 came.
double chance(std::size_t length, double share) {
    return share * (1 - 1 / (static_cast<double>(length) + 0.6));
}

}  // namespace

void Text::append(std::span<const int32_t> tokens) {
    for (const int32_t token : tokens) {
        tokens_.push_back(token);
        add_place();
    }
}

// After the last token, which is a gap or not.
void Text::add_place() {
    since_gap_ = tokens_.back() == kGap ? 0 : since_gap_ + 1;
    for (int level = 0; level < static_cast<int>(kGrams.size()); ++level) {
        Chains& chains = chains_[level];
        chains.before.resize(tokens_.size() + 1);
        if (since_gap_ >= kGrams[level]) chain(level, size());
    }
}

void Text::chain(int level, int32_t place) {
    Chains& chains = chains_[level];
    if (2 * static_cast<std::size_t>(chains.used) >= chains.latest.size()) widen(level);
    int32_t& latest = chains.latest[slot(level, tokens_.data() + place)];
    chains.used += latest == 0;
    chains.before[place] = std::exchange(latest, place);
}

void Text::widen(int level) {
    std::vector<int32_t>& latest = chains_[level].latest;
    const auto places =
        std::exchange(latest, std::vector<int32_t>(std::max(kFewest, 2 * latest.size())));
    for (const int32_t place : places)
        if (place != 0) latest[slot(level, tokens_.data() + place)] = place;
}

// Of the gram that ends at `end`: its own, or the free one that it would get.
std::size_t Text::slot(int level, const int32_t* end) const {
    const int n = kGrams[level];
    uint64_t hash = 0;
    for (int i = 1; i <= n; ++i)
        hash = (hash + static_cast<uint32_t>(end[-i])) * 0x9e3779b97f4a7c15u;
    const std::vector<int32_t>& latest = chains_[level].latest;
    const std::size_t mask = latest.size() - 1;
    for (std::size_t at = hash >> 20 & mask;; at = (at + 1) & mask) {
        const int32_t place = latest[at];
        if (place == 0 || std::equal(end - n, end, tokens_.data() + place - n)) return at;
    }
}

void Text::find(std::span<const int32_t> tail, std::vector<Match>& found) const {
    for (int level = static_cast<int>(kGrams.size()) - 1; level >= 0; --level) {
        const Chains& chains = chains_[level];
        if (static_cast<int>(tail.size()) < kGrams[level] || chains.used == 0) continue;
        int32_t place = chains.latest[slot(level, tail.data() + tail.size())];
        if (place == size()) place = chains.before[place];  // nothing follows it
        if (place == 0) continue;
        for (int left = kPlaces; place != 0 && left > 0; --left, place = chains.before[place])
            found.push_back({this, place, length(tail, place)});
        return;
    }
}

int32_t Text::length(std::span<const int32_t> tail, int32_t at) const {
    const int32_t most = std::min({kLongest, at, static_cast<int32_t>(tail.size())});
    int32_t same = 0;
    while (same < most && tokens_[at - 1 - same] == tail[tail.size() - 1 - same]) ++same;
    return same;
}

std::size_t Text::bytes() const {
    std::size_t words = tokens_.capacity();
    for (const Chains& chains : chains_) words += chains.latest.size() + chains.before.capacity();
    return words * sizeof(int32_t);
}

Suffixes::Suffixes(const int32_t* token_ids, std::size_t width, int32_t most_kept,
                   int32_t most_shared, int32_t most_running)
    : token_ids_(token_ids),
      width_(width),
      most_kept_(most_kept),
      most_shared_(most_shared),
      most_running_(most_running) {}

void Suffixes::begin(int row, const std::string& space) {
    forget(row, 0, 0);
    rows_[row].space = space;
}

Drafts Suffixes::propose(int row, int num_tokens, std::span<const int32_t> ahead, int most,
                         double least) {
    const auto found = rows_.find(row);
    if (found == rows_.end()) return {};
    const std::span known(token_ids_ + row * width_, static_cast<std::size_t>(num_tokens));
    Text& own = found->second.text;
    const int32_t fresh = num_tokens - own.size();
    if (num_running_ + fresh <= most_running_) {
        own.append(known.last(fresh));
        num_running_ += fresh;
    }
    const auto near = known.last(std::min<std::size_t>(num_tokens, Text::kLongest));
    tail_.assign(near.begin(), near.end());
    tail_.insert(tail_.end(), ahead.begin(), ahead.end());
    found_.clear();
    if (own.size() == num_tokens) own.find(tail_, found_);
    if (const auto corpus = corpora_.find(found->second.space); corpus != corpora_.end()) {
        corpus->second.used = ++clock_;
        corpus->second.young.find(tail_, found_);
        corpus->second.old.find(tail_, found_);
    }
    return follow(own, ahead, most, least);
}

// What followed the longest matches: at each token the most frequent one, of equally frequent ones
// that of the latest place. A place in the text itself whose end is reached goes on with what comes
// ahead and what was guessed: it is a cycle.
Drafts Suffixes::follow(const Text& own, std::span<const int32_t> ahead, int most, double least) {
    Drafts drafts;
    int32_t length = 0;
    double likely = 1;
    for (const Match& match : found_) length = std::max(length, match.length);
    std::erase_if(found_, [&](const Match& match) { return match.length < length; });
    const auto next = [&](const Match& match) {
        std::size_t at = match.at + drafts.tokens.size();
        if (match.text != &own || at < static_cast<std::size_t>(own.size()))
            return match.text->token(at);
        at -= own.size();
        return at < ahead.size() ? ahead[at] : drafts.tokens[at - ahead.size()];
    };
    while (static_cast<int>(drafts.tokens.size()) < most) {
        int32_t best = Text::kGap;
        std::ptrdiff_t most_often = 0;
        for (const Match& match : found_) {
            const int32_t token = next(match);
            if (token == Text::kGap || token == best) continue;
            const auto often = std::count_if(found_.begin(), found_.end(),
                                             [&](const Match& m) { return next(m) == token; });
            if (often > most_often) best = token, most_often = often;
        }
        if (best == Text::kGap) break;
        const double share = static_cast<double>(most_often) / found_.size();
        drafts.chances.push_back(chance(length + drafts.tokens.size(), share));
        likely *= drafts.chances.back();
        if (likely < least) {
            drafts.chances.pop_back();
            break;
        }
        std::erase_if(found_, [&](const Match& match) { return next(match) != best; });
        drafts.tokens.push_back(best);
    }
    return drafts;
}

void Suffixes::forget(int row, int from, int to) {
    const auto found = rows_.find(row);
    if (found == rows_.end()) return;
    if (from < to)
        keep(found->second.space,
             {token_ids_ + row * width_ + from, token_ids_ + row * width_ + to});
    num_running_ -= found->second.text.size();
    rows_.erase(found);
}

// The older half of a corpus goes when the younger is full; a whole one when others need its room
// and its texts were asked about least recently.
void Suffixes::keep(const std::string& space, std::span<const int32_t> tokens) {
    const int32_t half = most_shared_ / 2;
    tokens = tokens.last(std::min<std::size_t>(tokens.size(), half - 1));
    Corpus& corpus = corpora_[space];
    corpus.used = ++clock_;
    num_kept_ -= corpus.size();
    if (corpus.young.size() + static_cast<int32_t>(tokens.size()) + 1 > half)
        corpus.old = std::exchange(corpus.young, {});
    corpus.young.append(tokens);
    corpus.young.end_part();
    num_kept_ += corpus.size();
    while (num_kept_ > most_kept_) {
        const auto least = std::min_element(
            corpora_.begin(), corpora_.end(),
            [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
        num_kept_ -= least->second.size();
        corpora_.erase(least);
    }
}

std::size_t Suffixes::bytes() const {
    std::size_t sum = 0;
    for (const auto& [row, own] : rows_) sum += own.text.bytes();
    for (const auto& [space, corpus] : corpora_) sum += corpus.young.bytes() + corpus.old.bytes();
    return sum;
}

}  // namespace elinvar
