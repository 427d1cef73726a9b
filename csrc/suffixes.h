// Where what a text ends with has occurred before, in itself and among texts that ended lately, and
// what followed there: drafts for src/elinvar/run/drafters/suffix.py. Knows no Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace elinvar {

// A place in a text that follows `length` tokens which are also the last of what is asked about.
struct Match {
    const class Text* text;
    int32_t at;
    int32_t length;
};

// Tokens that only grow in number. Each place where a gram ends is chained to the place before
// where the same gram ended, so what is added costs the same however often it was there.
class Text {
  public:
    static constexpr std::array<int, 3> kGrams = {1, 3, 8};
    static constexpr int kPlaces = 16;
    static constexpr int kLongest = 64;
    static constexpr int32_t kGap = -1;  // no token: no match reaches across

    void append(std::span<const int32_t> tokens);
    void end_part() { tokens_.push_back(kGap), add_place(); }
    // Adds the latest kPlaces places where the longest gram that `tail` ends with ended before.
    void find(std::span<const int32_t> tail, std::vector<Match>& found) const;
    // What follows a place, or kGap.
    int32_t token(std::size_t at) const { return at < tokens_.size() ? tokens_[at] : kGap; }
    int32_t size() const { return static_cast<int32_t>(tokens_.size()); }
    std::size_t bytes() const;

  private:
    // Of one length of grams. Places are ends of grams, so 0 is none.
    struct Chains {
        std::vector<int32_t> latest;  // by hash; a power of two, at most half of it used
        std::vector<int32_t> before;  // by place
        int32_t used = 0;
    };
    void add_place();
    void chain(int level, int32_t place);
    void widen(int level);
    std::size_t slot(int level, const int32_t* end) const;
    int32_t length(std::span<const int32_t> tail, int32_t at) const;

    std::vector<int32_t> tokens_;
    std::array<Chains, kGrams.size()> chains_;
    int32_t since_gap_ = 0;
};

// What is guessed to follow.
struct Drafts {
    std::vector<int32_t> tokens;
    std::vector<double> chances;  // of each, if those before it come
};

class Suffixes {
  public:
    // token_ids [rows, width]: each row's text so far, written by others. Bounds in tokens: of what
    // is kept of ended texts (all, of one namespace), of rows that are looked into.
    Suffixes(const int32_t* token_ids, std::size_t width, int32_t most_kept, int32_t most_shared,
             int32_t most_running);

    // The row belongs to a text of this namespace from now on.
    void begin(int row, const std::string& space);
    // What follows the row's first num_tokens tokens and then `ahead`, as long as the whole is at
    // least so likely.
    Drafts propose(int row, int num_tokens, std::span<const int32_t> ahead, int most, double least);
    // The text is over; its tokens from .. to - 1 are for others of its namespace.
    void forget(int row, int from, int to);
    int32_t num_kept() const { return num_kept_; }
    int32_t num_running() const { return num_running_; }
    std::size_t bytes() const;

  private:
    struct Corpus {
        Text young, old;
        uint64_t used = 0;
        int32_t size() const { return young.size() + old.size(); }
    };
    struct Row {
        std::string space;
        Text text;
    };
    void keep(const std::string& space, std::span<const int32_t> tokens);
    Drafts follow(const Text& own, std::span<const int32_t> ahead, int most, double least);

    const int32_t* token_ids_;
    std::size_t width_;
    int32_t most_kept_, most_shared_, most_running_, num_kept_ = 0, num_running_ = 0;
    uint64_t clock_ = 0;
    std::unordered_map<int, Row> rows_;
    std::unordered_map<std::string, Corpus> corpora_;
    std::vector<int32_t> tail_;
    std::vector<Match> found_;
};

}  // namespace elinvar
