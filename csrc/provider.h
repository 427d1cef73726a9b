// The cpu provider: cuts each op into independent outputs and gives them to the pool. Threads
// split outputs, never a reduction.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <vector>

#include "args.h"
#include "edits.h"
#include "kernels.h"
#include "pool.h"

namespace elinvar {

// Memory that only grows; begins on a cache line.
class Floats {
  public:
    float* at_least(std::size_t floats) {
        if (size_ < floats) {
            data_.reset(static_cast<float*>(::operator new(floats * 4, kLine)));
            size_ = floats;
        }
        return data_.get();
    }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(float* p) const { ::operator delete(p, kLine); }
    };
    std::unique_ptr<float, Free> data_;
    std::size_t size_ = 0;
};

// Rows to multiply: as they are, and rounded where a matrix is quantised.
struct Rows {
    const float* x;
    QuantRows rounded;
};

// What one call of moe works on: a row for each pair of a token and one of its experts, grouped by
// expert.
struct Mixture {
    struct Group {  // rows first .. first + count - 1
        int expert, first, count;
        Rows in;
    };
    struct Tile {
        int group, row, count, panel, panels;
    };
    std::vector<Group> groups;         // of experts that have tokens, ascending
    std::vector<Tile> tiles, blocks;   // blocks: rows alone
    std::vector<int32_t> tokens;       // of each row
    std::vector<int32_t> places;       // [T, top_k]: the pairs' rows
    std::vector<float> factors, ones;  // of each row's input, where weights are; [top_k]
    std::vector<int> ends;
    std::vector<QuantGroup> rounded;
    Floats x, h, y;

    void group(int num_tokens, int top_k, const int32_t* ids, int num_experts);
    void scale_inputs(const float* weights, int top_k);
    void cut(int k, int panels, bool quantised, int threads);
    QuantRows rows(const Group& g, int k) {
        return {rounded.data() + g.first * std::ptrdiff_t{k / 32}, g.count, k / 32};
    }
};

// What one call of lora works on: rows grouped by adapter.
struct LoraWork {
    struct Group {  // order[first .. first + count - 1]
        int adapter, first, count;
    };
    struct Half {  // A x of a group, for all targets that share the A
        int group;
        const Matrix* a;
        float scale;
        std::ptrdiff_t at;
    };
    struct Whole {
        int half, col;
        const Matrix* b;
    };
    struct Tile {  // of a half or a whole
        int of, row, count, panel, panels;
    };
    std::vector<int> order;
    std::vector<Group> groups;
    std::vector<Half> halves;
    std::vector<Whole> wholes;
    std::vector<Tile> tiles;
    Floats x, h;

    void group(const int32_t* adapters, int rows, const std::vector<LoraTarget>& targets);
    void cut(int of, int rows, int panels, int width);
};

struct AttentionItem {
    AttentionTile tile;
    int first_split, num_splits;
    std::size_t parts;  // where in the shared parts; kOwnParts: nobody else needs them
};
constexpr std::size_t kOwnParts = ~std::size_t{0};

class Provider {
  public:
    Provider(int num_threads, const std::string& simd);  // "" = the widest

    const char* simd() const { return kernels_->name; }
    int num_threads() const { return pool_.size(); }

    void embed(const int32_t* ids, int rows, const Matrix& w, float scale, float* out);
    void rms_norm(const float* x, const float* y, const float* gain, float eps, int rows, int dim,
                  float* sum, float* out);
    void add(const float* x, const float* y, std::size_t n, float* out);
    void concat(const float* x, int x_dim, const float* y, int y_dim, int rows, float* out);
    void layer_norm(const float* x, const float* y, const float* gain, const float* bias, float eps,
                    int rows, int dim, float* sum, float* out);
    void activate(const float* x, int activation, std::size_t n, float* out);
    void scale(const float* x, float factor, std::size_t n, float* out);
    void scale_heads(const float* q, int rows, int width, const int32_t* positions,
                     const float* factors, float* out);
    void softcap(const float* x, float cap, std::size_t n, float* out);
    void linear(const float* x, int rows, const std::vector<const Matrix*>& ws, float* out,
                const float* bias = nullptr);
    void gated_linear(const float* x, int rows, const Matrix& gate, const Matrix& up,
                      int activation, float* out);
    void gated(const float* x, int rows, int cols, int activation, float* out);
    void lora(const float* x, int rows, int k, const int32_t* adapters,
              const std::vector<LoraTarget>& targets, float* y, std::ptrdiff_t ld);
    void route(const float* logits, int rows, const Route& a, int32_t* ids, float* weights);
    void moe(const float* x, int rows, int top_k, const int32_t* ids, const float* weights,
             const Experts& experts, int activation, bool scale_inputs, float* out);
    void rope_write(const Rope& a, int num_tokens);
    void rope_queries(const Rope& a, int num_tokens);
    void multiply_rows(const float* x, int rows, int dim, const float* y, std::ptrdiff_t y_step,
                       float* out);
    static constexpr int kMaxStreams = 16;
    void mix(const std::vector<const float*>& xs, int rows, int dim, const float* coefs,
             int outputs, float* out);
    void sparsify(const float* x, float deviations, int rows, int dim, float* out);
    void match_rms(const float* x, const float* y, int rows, int dim, float* out);
    void head_linear(const float* x, int x_step, int rows, const Matrix& w, int heads, float* out,
                     int out_step);
    void latent_write(const Latent& a, int num_tokens);
    void latent_query(const LatentQuery& a, int num_tokens, const Matrix& w);
    void attention(const Attention& a, int num_seqs, const int32_t* query_start);
    void index_select(const Index& a, int num_seqs, const int32_t* query_start, int k,
                      int32_t* chosen);
    void sparse_attention(const Attention& a, int num_seqs, const int32_t* query_start,
                          const int32_t* chosen, int k);
    // Of a, no output: positions and tables as in attention, no window and no chunk.
    void block_shares(const Attention& a, int num_seqs, const int32_t* query_start, float* shares,
                      std::ptrdiff_t stride);
    // States lie in blocks of 32 positions, tables as those of attention.
    void causal_conv(const Convolution& a, const StateTables& t);
    void delta_rule(const DeltaRule& a, const StateTables& t);
    void gated_rms_norm(const GatedNorm& a, int num_tokens);
    void sigmoid_gate(const float* x, const float* gate, std::size_t n, float* out);
    void pool(const float* x, int dim, const int32_t* starts, int num_seqs, const float* weights,
              float* out);
    void sample(const float* logits, int rows, int vocab, const SampleRow* args, int num_top,
                int32_t* ids, float* logprobs, int32_t* top_ids, float* top_logprobs,
                const SampleEdits& edits = {});
    void score(const float* logits, int rows, int vocab, const int32_t* ids, int num_top,
               float* logprobs, int32_t* top_ids, float* top_logprobs);

  private:
    QuantRows quantize(const float* x, int rows, int k);
    void multiply(const Matrix& w, int panel, int num, const Rows& in, int row, int count,
                  float* out, std::ptrdiff_t ld);
    void multiply_gated(const Matrix& gate, const Matrix& up, int activation, int panel, int num,
                        const Rows& in, int row, int count, float* out, int thread,
                        const float* gate_bias = nullptr, const float* up_bias = nullptr,
                        const float* factors = nullptr);
    void gather(const Rows& in, int num_tokens, const Experts& experts);
    void cut_chunks(const Attention& a);
    float* scratch(int thread, std::size_t floats);
    template <class Body>  // body(first, count) for pieces of n elements
    void in_pieces(std::size_t n, const Body& body);

    const Kernels* kernels_;
    Pool pool_;
    std::vector<Floats> scratch_;
    Floats parts_, gathered_, chosen_;
    std::vector<AttentionItem> items_, joins_;
    std::vector<std::size_t> chunks_;  // where each begins in items_, and the end
    std::vector<QuantGroup> groups_;
    std::vector<int32_t> ascending_;  // 0, 1, 2, ...
    Mixture mixture_;
    LoraWork lora_;
};

}  // namespace elinvar
