// Compiled once per instruction set (CMakeLists.txt sets ELINVAR_ISA and the flags). All code
// lives in that namespace: nothing compiled for a wide machine can be linked into a narrow path.
#include "kernels.h"

#include <type_traits>
#include <utility>

#include "simd.h"

namespace ELINVAR_ISA {

using elinvar::Attention;
using elinvar::AttentionAhead;
using elinvar::AttentionTile;
using elinvar::Convolution;
using elinvar::DeltaRule;
using elinvar::GatedNorm;
using elinvar::head_size;
using elinvar::Index;
using elinvar::Kernels;
using elinvar::Kind;
using elinvar::kMaxHeadDim;
using elinvar::Latent;
using elinvar::LatentQuery;
using elinvar::Peak;
using elinvar::QuantGroup;
using elinvar::QuantRows;
using elinvar::Rope;
using elinvar::StateSpan;
using elinvar::turned_dims;

template <Kind kind>  // in the cache
using Stored = std::conditional_t<kind == Kind::f32, float,
                                  std::conditional_t<kind == Kind::int8, int8_t, uint16_t>>;

#include "attention.h"
#include "group_dot.h"
#include "linear_float.h"
#include "linear_quant.h"
#include "maps.h"
#include "rows.h"
#include "rows_latent.h"
#include "rows_recurrent.h"
#include "sample.h"
#include "shares.h"
#include "sparse.h"
#include "streams.h"

#define EL_TEXT(x) #x
#define EL_NAME(x) EL_TEXT(x)

extern const Kernels kernels;
const Kernels kernels = {
    EL_NAME(ELINVAR_LEVEL),
    quantize_rows,
    linear_quant,
    linear_float,
    activate,
    rms_norm,
    add,
    rope_write,
    latent_write,
    latent_rotate,
    attention_part,
    attention_join,
    index_scores,
    peak,
    log_sum,
    finite_row,
    mask_row,
    scale_logits,
    exp_all,
    log_one,
    top_k,
    gumbel_argmax,
    layer_norm,
    add_bias,
    activate_all,
    scale,
    softcap,
    gather_quant,
    multiply,
    mix,
    sparsify,
    match_rms,
    rope_queries,
    weighted_sum,
    causal_conv,
    delta_rule,
    gated_rms_norm,
    sigmoid_gate,
    block_shares,
};

}  // namespace ELINVAR_ISA
