// The kernels of one instruction set, behind one table. Kernels know no threads: the provider
// cuts work into ranges of outputs and calls them. No range changes the bits of an output.
#pragma once

#include <cstddef>
#include <cstdint>

namespace elinvar {

// Activations rounded to int8: a group of 32 of one row, x ~ scale * code.
struct QuantGroup {
    int8_t codes[32];
    float scale;
    float sum;     // scale * (sum of the codes)
    int32_t isum;  // sum of the codes
};

// Rows lie in blocks of eight, the last one as high as it is: [block][group][row]. So a tile of
// rows reads one stream (linear_quant.h finds a row's records).
struct QuantRows {
    static constexpr int kBlock = 8;
    QuantGroup* data;
    int rows;
    std::ptrdiff_t groups;
};

// Of weights all but the last, of the cache the last four.
enum class Kind : int { q4, q5, q8, f16, bf16, f32, int8 };

// Bytes of a group of 32 in a quantised panel: codes, scales f16 [16], then mins f16 [16] or none.
constexpr int code_bytes(Kind kind) {
    return kind == Kind::q4 ? 256 : kind == Kind::q5 ? 320 : 512;
}
constexpr bool has_mins(Kind kind) { return kind != Kind::q8; }
constexpr int group_bytes(Kind kind) { return code_bytes(kind) + (has_mins(kind) ? 64 : 32); }

// Bytes of one element of the cache.
constexpr int cache_bytes(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::int8 ? 1 : 2; }
// Elements of one head's keys in a block, and of its values. Behind those of int8 lie 32 scales in
// f32, one a token.
constexpr std::ptrdiff_t head_size(Kind kind, int padded_dim) {
    return std::ptrdiff_t{32} * (kind == Kind::int8 ? padded_dim + 4 : padded_dim);
}

// How many dims, 16 apart, of a key of int8 are turned together (ops/api.py, rope_write).
constexpr int turned_dims(int dim) { return dim % 16 ? 1 : dim / 16 & -(dim / 16); }
constexpr int kMaxHeadDim = 1024;

struct Rope {
    const float* qkv;  // [T, (heads + 2 kv_heads) dim]
    const int32_t* positions;
    const float* table;  // [P, rotary_dim] cos | sin
    const int32_t* slots;
    const float *q_gain, *k_gain;  // null, [dim], or with `whole` [heads * dim], [kv_heads * dim]
    float eps;
    int heads, kv_heads, dim, rotary_dim, padded_dim;
    Kind kv_kind;
    // Of block 0, head_size apart: kv_heads times [padded_dim, 32] and [32, padded_dim]; v null:
    // keys alone
    void *k, *v;
    int block_step;      // from a block to the next, in the size of one head's keys
    float* q;            // [T, heads, dim]
    bool whole = false;  // one norm over all heads of q, one over those of k
    const float* v_gain = nullptr;
};

// What multi-head latent attention keeps of a token: one key for all heads, of which the first
// `rank` dims, the latent, are the value too.
struct Latent {
    const float* x;  // [T, rank + rope_dim]
    const int32_t* positions;
    const float* table;  // [P, rope_dim] cos | sin
    const int32_t* slots;
    const float* gain;  // [rank]
    float eps;
    int rank, rope_dim, padded_dim;
    Kind kv_kind;
    void* k;         // [padded_dim, 32] of block 0
    int block_step;  // as in Rope
};

// Its queries: what is rotated of each head goes behind what was multiplied.
struct LatentQuery {
    const float* q;  // [T, heads, nope_dim + rope_dim]
    const int32_t* positions;
    const float* table;
    int heads, nope_dim, rope_dim, rank;
    float* out;  // [T, heads, rank + rope_dim]
};

struct Attention {
    const float* q;     // [T, heads, dim]
    const void *k, *v;  // as in Rope; v == k: the values are the first value_dim dims of the keys
    int block_step;
    Kind kv_kind;
    int heads, kv_heads, dim, padded_dim, value_dim;
    const int32_t* tables;  // [R, table_stride]
    std::ptrdiff_t table_stride;
    const int32_t* positions;
    float scale;
    int window;  // 0: none
    float* out;  // [T, heads, value_dim]
    // Switches of some families (ops/api.py).
    float softcap = 0.0f;          // 0: none
    const float* sinks = nullptr;  // [heads] or null
    int chunk = 0;                 // 0: none
    int first = 0;                 // no key before it is seen

    int padded_values() const { return (value_dim + 15) / 16 * 16; }
};

// The first key that a query at position p sees; it never falls as p rises.
constexpr int first_key(const Attention& a, int p) {
    const int of_window = a.window && a.window <= p ? p - a.window + 1 : 0;
    const int of_chunk = a.chunk ? p - p % a.chunk : 0;
    const int first = of_window > of_chunk ? of_window : of_chunk;
    return first > a.first ? first : a.first;
}

// What sparse attention chooses keys by: queries of several heads over a cache of keys alone.
struct Index {
    const float* q;        // [T, heads, dim]
    const float* weights;  // [T, heads]
    const void* k;
    int block_step;
    Kind kv_kind;
    int heads, dim, padded_dim;
    const int32_t* tables;  // [R, table_stride]
    std::ptrdiff_t table_stride;
    const int32_t* positions;
    int first = 0;  // no key before it is seen
};

struct AttentionTile {  // tokens of one sequence, times query heads of one KV head
    int seq, first_token, num_tokens, kv_head, first_head, num_heads;
    int rows() const { return num_tokens * num_heads; }
};
// Keys (absolute positions) whose softmax is accumulated before it is merged (ops/api.py).
constexpr int kAttentionSplit = 1024;
// Floats of what one split leaves of a tile of `rows` query rows; whole cache lines.
constexpr std::size_t attention_part_floats(int rows, int padded_dim) {
    return (static_cast<std::size_t>(rows) * (static_cast<std::size_t>(padded_dim) + 2) + 15) & ~15;
}

// Of one call of block_shares.
constexpr std::size_t shares_room(int num_blocks) {
    return std::size_t{16} * ((static_cast<std::size_t>(num_blocks) + 15) / 16 * 16);
}

// Where the keys begin that a thread reads next, so that it may ask for them: two blocks of a KV
// head, block * block_step + kv_head.
struct AttentionAhead {
    std::ptrdiff_t blocks[2];
};

// What the tokens of one sequence do to its state, which lies in blocks of its own (ops/api.py).
struct StateSpan {
    int first, count;  // tokens of this step
    int from, to;      // blocks of the state before (-1: there is none) and after; may be one
};

// A causal convolution over the tokens, each of `channels` columns by itself, and its SiLU.
struct Convolution {
    const float* x;  // [T, ld], of which the first columns
    std::ptrdiff_t ld;
    const float* w;             // [taps, channels]
    float* tails;               // [taps - 1, channels] of block 0: the inputs before the next one
    std::ptrdiff_t block_step;  // floats from a block to the next
    int channels, taps;
    float* out;  // [T, channels]
};

struct DeltaRule {
    const float* qkv;  // [T, 2 key_heads key_dim + heads value_dim]
    const float* x;    // [T, ld], the last columns: betas [heads], then decays [heads], both raw
    std::ptrdiff_t ld;
    const float *a_log, *dt_bias;  // [heads]
    float* states;                 // [heads, key_dim, padded_dim] of block 0
    std::ptrdiff_t block_step;
    int key_heads, heads, key_dim, value_dim;
    float* out;  // [T, heads, value_dim]

    int padded_dim() const { return (value_dim + 15) / 16 * 16; }
};

// Rows of heads, normed and gated by the columns of another array.
struct GatedNorm {
    const float* x;     // [T, heads, dim]
    const float* gate;  // [T, ld], of which the first heads * dim columns
    std::ptrdiff_t ld;
    const float* gain;  // [dim]
    float eps;
    int heads, dim;
    float* out;  // as x
};

struct Peak {
    float max;
    int32_t argmax;  // the lowest id among equals
};

// Panels are packed as ops/layout.py says. `num_cols` counts the real columns from the first panel;
// linear_quant's first_row begins a block; without `first` linear_float goes on with the chains
// that `out` holds.
struct Kernels {
    const char* name;
    void (*quantize_rows)(const float* x, int rows, const QuantRows& out, int first_row);
    void (*linear_quant)(Kind kind, const uint8_t* panels, std::size_t stride, int num_panels,
                         const QuantRows& x, int first_row, int rows, float* out,
                         std::ptrdiff_t ld_out, int num_cols);
    void (*linear_float)(Kind kind, const uint8_t* panels, std::size_t stride, int num_panels,
                         const float* x, int k, int rows, float* out, std::ptrdiff_t ld_out,
                         int num_cols, bool first);
    // gate[i] = act(gate[i]) * up[i] over rows of `cols` values; activations are numbered as in
    // ops/api.py
    void (*activate)(int activation, float* gate, std::ptrdiff_t ld_gate, const float* up,
                     std::ptrdiff_t ld_up, int rows, int cols);
    // y == nullptr: plain norm; otherwise sum = x + y is stored and normalised
    void (*rms_norm)(const float* x, const float* y, const float* gain, float eps, int rows,
                     int dim, float* sum, float* out);
    void (*add)(const float* x, const float* y, std::size_t n, float* out);
    void (*rope_write)(const Rope& a, int first_token, int num_tokens);
    void (*latent_write)(const Latent& a, int first_token, int num_tokens);
    void (*latent_rotate)(const LatentQuery& a, int first_token, int num_tokens);
    // What the keys of one split give to a tile, and the output of all its parts, one after the
    // other in memory and by ascending split; the join overwrites them.
    void (*attention_part)(const Attention& a, const AttentionTile& t, int split,
                           const AttentionAhead& ahead, float* part);
    void (*attention_join)(const Attention& a, const AttentionTile& t, float* parts, int num_parts);
    // The worth of the 32 keys of each of some blocks to one token.
    void (*index_scores)(const Index& a, int token, const int32_t* blocks, int num, float* out);
    Peak (*peak)(const float* x, int n);
    // ln of the sum of e^(x - max)
    float (*log_sum)(const float* x, int n, float max);
    // out = x, finite; NaN becomes the lowest float
    void (*finite_row)(const float* x, int n, float* out);
    // -inf where bit i % 32 of word i // 32 is not set
    void (*mask_row)(const uint32_t* words, int n, float* x);
    // z[i] = (x[i] - max) / temperature; returns the sum of e^z when asked
    float (*scale_logits)(const float* x, int n, float max, float temperature, bool sum, float* z);
    void (*exp_all)(const float* z, int n, float* out);
    float (*log_one)(float x);
    // ids of the k largest, largest first, equal ones by id
    void (*top_k)(const float* x, int n, int k, int32_t* ids);
    // The id of the largest z + Gumbel noise of (seed, position, id) among those with z >= least,
    // equal ones: the lowest id. ids == nullptr: z[i] belongs to id i.
    int (*gumbel_argmax)(const float* z, const int32_t* ids, int n, float least, uint64_t seed,
                         uint32_t position);
    // As rms_norm; bias may be null.
    void (*layer_norm)(const float* x, const float* y, const float* gain, const float* bias,
                       float eps, int rows, int dim, float* sum, float* out);
    // Each row of `cols` values plus bias, in place.
    void (*add_bias)(const float* bias, int rows, int cols, float* out, std::ptrdiff_t ld);
    void (*activate_all)(int activation, const float* x, std::size_t n, float* out);
    void (*scale)(const float* x, float factor, std::size_t n, float* out);
    void (*softcap)(const float* x, float cap, std::size_t n, float* out);
    // Rows from[i] of x become rows first_row + i of out.
    void (*gather_quant)(const QuantRows& x, const int32_t* from, int rows, const QuantRows& out,
                         int first_row);
    void (*multiply)(const float* x, const float* y, std::size_t n, float* out);
    // out = sum of coefs[i] * xs[i], from 0 a chain of FMAs by ascending i
    void (*mix)(const float* const* xs, const float* coefs, int count, int n, float* out);
    // The largest of 0 and what each of n values has beyond mean + deviations * deviation
    void (*sparsify)(const float* x, float deviations, int n, float* out);
    // x as large as y: ops/api.py
    void (*match_rms)(const float* x, const float* y, int n, float* out);
    // The queries of rope_write alone; no keys, no values, no slots
    void (*rope_queries)(const Rope& a, int first_token, int num_tokens);
    // out = sum of weights[i] * row rows[i] of y, a chain of FMAs by ascending i
    void (*weighted_sum)(const float* y, std::ptrdiff_t ld, const int32_t* rows,
                         const float* weights, int count, int cols, float* out);
    // Channels first .. first + num - 1.
    void (*causal_conv)(const Convolution& a, const StateSpan& s, int first, int num);
    // Columns first .. first + num - 1 of a head's values; first is a multiple of 16.
    void (*delta_rule)(const DeltaRule& a, const StateSpan& s, int head, int first, int num);
    void (*gated_rms_norm)(const GatedNorm& a, int first_token, int num_tokens);
    // x / (1 + e^-gate)
    void (*sigmoid_gate)(const float* x, const float* gate, std::size_t n, float* out);
    // Row t of `shares` becomes at least what part of its attention any head of token t gives to
    // each block; of some tokens of a sequence, whose first num_blocks blocks are all that they
    // see. `room` takes shares_room(num_blocks) floats.
    void (*block_shares)(const Attention& a, int seq, int first_token, int num_tokens,
                         int num_blocks, float* room, float* shares, std::ptrdiff_t stride);
};

// Instruction sets of this machine, widest first; always ends with "scalar".
const Kernels* const* available_kernels(int* count);

}  // namespace elinvar
