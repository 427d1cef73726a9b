// What ops of the provider take besides arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace elinvar {

std::size_t panel_bytes(Kind kind, int k);  // as ops/layout.py says

struct Matrix {  // a packed weight; the bytes belong to the caller
    Kind kind;
    int n, k;
    const uint8_t* data;
    std::size_t panel_bytes;

    Matrix(Kind kind, int n, int k, const uint8_t* data, std::size_t bytes);
    int num_panels() const { return (n + 15) / 16; }
    const uint8_t* panel(int p) const { return data + panel_bytes * static_cast<std::size_t>(p); }
    bool quantised() const { return kind <= Kind::q8; }
};

// The gated MLPs of one layer, all of one shape, their matrices of any kinds.
struct Experts {
    std::vector<const Matrix*> gates, ups, downs;
    // Whether any gate or up wants x rounded, or as it is; whether any down wants its rows rounded.
    bool rounds_x = false, takes_x = false, rounds_h = false;
    // [experts, outputs] or null
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;

    Experts(std::vector<const Matrix*> gates, std::vector<const Matrix*> ups,
            std::vector<const Matrix*> downs);
    int dim() const { return gates[0]->k; }
    int ff_dim() const { return gates[0]->n; }
};

struct Route {  // ops/api.py says what each means
    int num_experts, top_k;
    bool sigmoid, renormalise;
    float scaling;
    const float* bias;  // [num_experts] or null
    int num_groups, top_groups;
};

// What each adapter adds to one of the matrices that are multiplied side by side.
struct LoraTarget {
    struct Pair {  // null: this adapter leaves the matrix alone
        const Matrix *a = nullptr, *b = nullptr;
        float scale = 0;
    };
    int col;  // where the matrix's outputs begin
    std::vector<Pair> pairs;
};

struct SampleRow {
    uint64_t seed;
    int position;
    float temperature;
    int top_k;
    float top_p, min_p;
};

// Whose states an op continues: sequence i's tokens are query_start[i] .. query_start[i + 1] - 1.
struct StateTables {
    int num_seqs;
    const int32_t *query_start, *seq_lens, *tables;
    std::ptrdiff_t stride;

    StateSpan span(int i) const;
};

}  // namespace elinvar
