"""Every op: its signature, shapes and meaning. A provider implements them; `ref` is the oracle.

Arrays are numpy, float32 unless said, C-contiguous. Legend: T tokens, D model or head dim,
K inputs, N outputs, H heads, R sequences, L logit rows, V vocabulary, P positions, B blocks.

Each output element has one reduction order, fixed here (the contract, docs/design/001):
sums over k in `linear` are one ascending chain of FMAs; sums that cross lanes (norms, softmax)
are 16 partial sums, element i going to partial i mod 16, joined by the tree 8, 4, 2, 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import Activation, KVDtype, KVSpec, Scoring
from elinvar.ops.arguments import F32, I32, Experts, Lora, SampleArgs, SampleResult
from elinvar.ops.caches import KVLayer, StateLayer
from elinvar.ops.layout import Kinds, Weight

ATTENTION_SPLIT = 1024
"""Keys (absolute positions) whose softmax is accumulated before it is merged, in ascending
order, into the row's result. Part of attention's definition."""


Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


class Ops(Protocol):
    """What a provider offers. Inputs are never changed, but the KV cache by rope_write and latent_write,
    y by lora, shares by block_shares, and states by causal_conv and delta_rule."""

    name: str

    arithmetic: str
    """What else, besides the provider, decides about bits here; empty: nothing."""

    full_batch: int
    """Tokens of a forward that keep the ops busy: with more at once none takes less time."""

    stored: Kinds
    """Formats of files (ops.stored) that all products take as they are."""

    @property
    def widest_kv(self) -> KVDtype:
        """The format of a cache that keeps keys and values as they were computed."""
        ...

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        """The zeroed caches of the layers of `spec`: KVLayers, or StateLayers where it has a state.
        Where graph_size rounds there is one block more, which nobody reads. Raises MemoryError."""
        ...

    def prepare(self, weights: Mapping[str, Any], beside: bool = False) -> None:
        """Before a model of these weights is built: they are brought to where the ops run. beside:
        what is built goes with a model that is there, and changes nothing of it."""
        ...

    def warm_up(
        self, run: Callable[[], object], weights: Iterable[Any], progress: Progress
    ) -> None:
        """Before the first step: these weights (all of the model's) are brought to where the ops run, for
        which `run` may be called, a forward of one token. Raises MemoryError where they do not fit."""
        ...

    def exchange(self, weights: Mapping[str, Any], pairs: Sequence[tuple[Any, Any]] | None) -> bool:
        """The matrices among the weights of a model hold other numbers than when they were used last, and
        of each pair of arrays or Experts the second takes the place of the first; None: nobody knows
        what takes whose. Whether what was recorded before computes with the new ones."""
        ...

    def release(self, weights: Iterable[Any]) -> None:
        """Give back the memory that these weights (all of the model's) take where the ops run: they are
        brought there again at their next use. What was recorded before must not be run again."""
        ...

    def available_memory(self) -> int | None:
        """Bytes that caches may take where the ops run; None: the memory of this process."""
        ...

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch with its arrays where the ops run. It may be the same one."""
        ...

    def place(self, array: NDArray[Any]) -> Any:
        """The array where the ops run, where it may be changed. It may be the same one."""
        ...

    def fetch(self, x: F32) -> F32:
        """What an op gave, as numbers of the host."""
        ...

    def columns(self, x_TN: F32, start: int, stop: int) -> F32:
        """Columns start .. stop - 1 of x, by themselves."""
        ...

    def stack(self, parts_TD: Sequence[F32]) -> F32:
        """Their rows, those of one after those of the other: an array of their own, in f32."""
        ...

    def download(self, batch: ForwardBatch) -> None:
        """Waits until what ops wrote for the batch, shares, is in the arrays that `upload` was given."""
        ...

    def graph_size(self, count: int) -> int:
        """For how many tokens, or sequences, a step with so many is recorded."""
        ...

    def embed(self, ids_T: I32, w_VD: Weight, scale: float) -> F32:
        """Rows of w times scale -> [T, D]. An id that w has no row for has row 0."""
        ...

    def rms_norm(self, x_TD: F32, gain_D: F32, eps: float) -> F32:
        """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019)."""
        ...

    def add(self, x_TD: F32, y_TD: F32) -> F32: ...

    def concat(self, x_TD: F32, y_TE: F32) -> F32:
        """x and y side by side -> [T, D + E]."""
        ...

    def add_rms_norm(self, x_TD: F32, y_TD: F32, gain_D: F32, eps: float) -> tuple[F32, F32]:
        """(s, rms_norm(s)) with s = x + y."""
        ...

    def layer_norm(self, x_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> F32:
        """(x - mean) / sqrt(variance + eps) * gain + bias (Ba et al., 2016). The mean's sum comes
        first, then that of (x - mean)^2, each over 16 partial sums; after it one rounded operation
        an element and step: subtract, times 1 / sqrt, times gain, plus bias where there is one."""
        ...

    def add_layer_norm(
        self, x_TD: F32, y_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float
    ) -> tuple[F32, F32]:
        """(s, layer_norm(s)) with s = x + y."""
        ...

    def scale(self, x_TD: F32, factor: float) -> F32:
        """x * factor, rounded once."""
        ...

    def scale_heads(self, q_THD: F32, positions_T: I32, factors_P: F32) -> F32:
        """Each token's queries times factors[position], rounded once."""
        ...

    def softcap(self, x_TD: F32, cap: float) -> F32:
        """cap * tanh(x / cap) (Gemma Team, 2024)."""
        ...

    def activate(self, x_TD: F32, activation: Activation) -> F32: ...

    def linear(self, x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> F32:
        """x w^T of several matrices with one K, side by side -> [T, sum of N]; the bias of all of
        them is added to the finished chains.

        Quantised weights: x is rounded to int8 per token and group of 32
        (scale = max|x| / 127; infinities and NaN count as the largest float); a group's
        integer dot is exact, then y = fma(dot, w_scale * x_scale, y), and with mins
        y = fma(min, x_scale * sum(codes), y).
        """
        ...

    def gated_linear(self, x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> F32:
        """act(x gate^T) * (x up^T) -> [T, N]."""
        ...

    def gated(self, x_TN: F32, activation: Activation) -> F32:
        """act(the first half of a row) * (the second) -> [T, N / 2]: of `linear` by gate and up side
        by side it makes `gated_linear`, to the bit."""
        ...

    def lora(self, y_TN: F32, x_TK: F32, adapters_T: I32, lora: Lora) -> None:
        """Adds to y = x w^T what the adapter of each row has for the matrices of w; -1: none. With h
        = A x, each a chain as in `linear` that is then multiplied by the scale and rounded, the
        chain of an output goes on: y = fma(h_j, B_nj, y) by ascending j. What no adapter changes is
        not touched."""
        ...

    def route(
        self,
        logits_TE: F32,
        k: int,
        scoring: Scoring,
        renormalise: bool,
        scaling: float,
        bias_E: F32 | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[I32, F32]:
        """The k experts of each token by ascending id, and their weights: [T, k] each.

        A token's scores are the softmax or the sigmoid of its logits. Chosen are the k experts with
        the largest score + bias (without bias, and without groups if sigmoid: the largest logit, which
        is the same order), of equal ones the lower id. The experts may lie in groups, one after the other, and only
        those of the `top_groups` best groups be eligible, of equal ones the first: a group is worth
        its best expert (softmax; DeepSeek-AI, 2024), or the sum of its two best (sigmoid). A weight
        is the score, with `renormalise` over the ascending sum of those chosen, times `scaling`.

        A softmax over the chosen logits alone (gpt-oss) is softmax with `renormalise`."""
        ...

    def moe(
        self,
        x_TD: F32,
        ids_TK: I32,
        weights_TK: F32,
        experts: Experts,
        activation: Activation,
        scale_inputs: bool = False,
    ) -> F32:
        """sum over a token's experts of weight * (down (act(gate x) * up x)) -> [T, D]: from 0 one
        chain of FMAs by ascending expert id, the order in which ids_TK must hold them. An expert's
        products are those of `gated_linear` and `linear`; its biases are added to the finished
        chains. With `scale_inputs` (Llama 4) a weight is a factor of what its expert sees: the finished
        chains gate x and up x are multiplied by it, and the sum has weights of 1."""
        ...

    def rope_write(
        self,
        qkv_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        kv: KVLayer,
        slots_T: I32,
        num_heads: int,
        q_gain_D: F32 | None,
        k_gain_D: F32 | None,
        eps: float,
        v_gain_D: F32 | None = None,
    ) -> F32:
        """Split qkv [T, (H + 2 Hkv) D]; RMS norm of q and k where gains are given, of each head by
        gains [D], or of all heads as one row by gains [H D] and [Hkv D] (OLMo 2), and of each head
        of v; rotate the first
        R dims of each head of q and k, pairs (i, i + R/2), by rope_PD[position] [R] = cos in the
        first half, sin in the second (R from 0 to D; the other dims stay); write k and v to their
        slots, saturated to the largest number of the cache's dtype (NaN too). Returns q [T, H, D].
        A cache that holds keys alone gets no v: qkv is [T, (H + Hkv) D].

        int8: keys with values of their own are turned first, from `attention` nothing is seen of it:
        of D = 16 m dims those 16 apart, 2^j of them as 2^j divides m, by Hadamard's matrix of ones and
        minus ones, as sums and differences of dims 16, 32, 64 ... apart; the scale is divided by 2^j.
        Then each key and each value of a head becomes codes round(x * (127 / m)), of two as near
        the even one, and a scale m / 127 in f32, where m is its own largest |x|; below 1e-30 all are
        0. It saturates at 127 * 2^121, so that codes times scale are finite."""
        ...

    def rope_queries(
        self,
        q_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        num_heads: int,
        gain_D: F32,
        eps: float,
    ) -> F32:
        """What `rope_write` returns, of queries [T, H D] that have no keys and values of their own."""
        ...

    def mul(self, x_TD: F32, y_TN: F32, start: int = 0) -> F32:
        """x * y[:, start : start + D]; of a y with one row that one for all."""
        ...

    def mix(self, xs_TD: Sequence[F32], coefs_TC: F32) -> F32:
        """S streams and coefs [T, O S] -> O streams [O, T, D]: stream o is from 0 one chain of FMAs
        over ascending s, coefs[:, o S + s] times stream s. S is at most 16."""
        ...

    def sparsify(self, x_TN: F32, deviations: float) -> F32:
        """max(x - t, 0) with t = fma(deviations, standard deviation, mean) of the row (Gemma 3n). The
        deviation is the root of the variance, the sums are those of `layer_norm`."""
        ...

    def match_rms(self, x_TD: F32, y_TD: F32) -> F32:
        """x times rms(y) / rms(x), the roots of mean squares, of x at least of 1e-5. Sums as in
        `rms_norm`, then a root each, their ratio and one product an element."""
        ...

    def head_linear(self, x_TK: F32, w: Weight, num_heads: int) -> F32:
        """A matrix of its own for every head: x [T, H K], w [H N, K], where rows h N .. of w belong
        to head h -> [T, H N]. N is a multiple of 16. Each output as in `linear`."""
        ...

    def latent_query(
        self, q_TN: F32, w: Weight, positions_T: I32, rope_PD: F32, num_heads: int
    ) -> F32:
        """Queries of latent attention (DeepSeek-AI, 2024). Of each head of q, K dims are multiplied
        by the head's rows of w [H R, K], as in `head_linear`; the others, as many as rope_PD is
        wide, are rotated as in `rope_write` and follow them -> [T, H, R + rope]. R is a multiple
        of 16."""
        ...

    def latent_write(
        self,
        x_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        kv: KVLayer,
        slots_T: I32,
        gain_R: F32,
        eps: float,
    ) -> None:
        """Writes the one key of each token: RMS norm of the first R dims of x, the latent, then its
        other dims rotated; saturated as in `rope_write`. kv.v views the same latents."""
        ...

    def attention(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
        positions_T: I32,
        scale: float,
        window: int | None,
        *,
        softcap: float | None = None,
        sinks_H: F32 | None = None,
        chunk: int | None = None,
        first: int = 0,
    ) -> F32:
        """Attention over the cache -> [T, H * value dim]. A query at position p sees keys n .. p,
        where n is the largest of `first` (slots before it may hold nothing: nn/mtp.py),
        p - window + 1 and p // chunk * chunk (Llama 4). A score is q·k * scale, with `softcap`
        (Gemma 2) softcap * tanh(q·k * scale / softcap). That is causal attention; where positions_T
        holds each sequence's last position for all of its queries, they see all its keys, as in
        encoders.

        With keys and values of int8 the dot q·k is that of q, turned as keys are, and the codes, one chain of FMAs over
        ascending d like the others, and what multiplies it is the key's scale times `scale`, rounded;
        the codes of a value are weighted by e^(s - m) times the value's scale, rounded, and l is
        the sum of e^(s - m) itself.

        Keys are walked in blocks of 32 at absolute positions with a running softmax (Milakov and
        Gimelshein, 2018), restarted every ATTENTION_SPLIT keys and merged in ascending order (Dao
        et al., 2023) into a max m of scores, a sum l of e^(s - m) and the values a weighted by
        them; out = a / l. A head's sink (Xiao et al., 2023; gpt-oss) is a score without a value
        that is joined last: n = max(m, sink), out = (a * e^(m - n)) / fma(l, e^(m - n),
        e^(sink - n))."""
        ...

    def block_shares(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        scale: float,
        shares_TB: F32,
        *,
        softcap: float | None = None,
        sinks_H: F32 | None = None,
    ) -> None:
        """Shares become at least what part of its attention any head of a token gives to each block
        of 32 keys. What a head gives to the blocks that a query at position p sees, those of keys
        0 .. p, adds up to 1, or to less with a sink. Scores are those of `attention`. A block has
        its largest score m_b and l_b, the sum of e^(s - m_b); w_b = l_b * e^(m_b - m), where m is
        the largest m_b, or the sink; its share is w_b over the sum of all w_b, to which
        e^(sink - m) is added last. Blocks, too, are 16 partial sums."""
        ...

    def index_select(
        self,
        q_THD: F32,
        weights_TH: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        k: int,
        first: int = 0,
    ) -> I32:
        """The k positions that each token is to attend to (DeepSeek-AI, 2025) -> [T, k], ascending;
        -1 follows where it sees fewer. A query at position p sees keys first .. p of the cache's
        one head, each worth the sum over the query's heads of weight * max(0, q·k) (0 where that is
        NaN): a dot as in `attention`, then from 0 one chain of FMAs by ascending head. The largest
        are chosen, of equal ones the first; NaN is the lowest."""
        ...

    def sparse_attention(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        chosen_TK: I32,
        scale: float,
    ) -> F32:
        """`attention` over latents of each token to the positions chosen for it alone, as if they were
        0, 1, 2, ... in a cache of their own: blocks and splits count the chosen ones. So where all
        that a token sees were chosen, its bits are those of `attention`."""
        ...

    def causal_conv(
        self,
        x_TN: F32,
        w_KC: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        """silu of sum over j of w[j] * (input K - 1 - j tokens back), of the first C columns of x
        -> [T, C]; from 0 one chain of FMAs by ascending j. Inputs before a step's first token come
        from the block of the position before it, those before a sequence are 0; the block of its
        last token takes the last K - 1 inputs."""
        ...

    def delta_rule(
        self,
        qkv_TC: F32,
        x_TN: F32,
        a_log_H: F32,
        dt_bias_H: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        """The gated delta rule (Yang, Kautz and Hatamizadeh, 2024), token by token -> [T, H V].

        A token of qkv is q and k [Hk, D] and v [H, V]; head h goes with key head h // (H / Hk). The
        last 2 H columns of x are b and a, of which beta = sigmoid(b) and decay = e^(-e^a_log *
        softplus(a + dt_bias)). q and k are multiplied by 1 / sqrt(sum of squares + 1e-6), the sum
        over 16 partial sums, and q by 1 / sqrt(D). Then, for each head's state S [D, V],
        S *= decay, u = (v - k S) * beta, S += k u (an FMA), out = q S: the sums over D are one
        ascending chain of FMAs each. A step goes on from the state in the block of the position
        before its first token (from 0 at the start of a sequence) and leaves its own in the block
        of its last token; the two may be one."""
        ...

    def gated_rms_norm(self, x_TN: F32, gate_TN: F32, first: int, gain_D: F32, eps: float) -> F32:
        """RMS norm of each D columns of x, times silu of the gate's columns from `first` on."""
        ...

    def sigmoid_gate(self, x_TN: F32, gate_TN: F32) -> F32:
        """x / (1 + e^-gate)"""
        ...

    def pool(self, x_TD: F32, starts: I32, weights_T: F32 | None) -> F32:
        """For each r the rows starts[r] .. starts[r + 1] - 1 of x, times their weights, summed ->
        [R, D]: from 0 one chain of FMAs by ascending row. Without weights the largest of each
        column; then there is no r without rows."""
        ...

    def spread(self, x_LC: F32, columns_V: I32) -> F32:
        """Logits over another vocabulary [L, V]: column v is the column columns_V[v] of x, or -inf
        where that is below 0."""
        ...

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        """A call that does the ops of `run` again, on what the same arrays hold by then.

        `run` must call ops alone, whatever the arrays hold: it may be run to learn them, and its
        results mean nothing (who runs it gives back the states that it went on from). Weights, caches and input arrays must outlive the recording. The
        result is valid until the next call of any recording of this provider.
        """
        ...

    def sample(self, logits_LV: F32, args: SampleArgs) -> SampleResult:
        """Temperature, then typical-p, top-k over what that kept, top-p over what top-k kept, min-p;
        then the Gumbel-max rule (Gumbel, 1954) over the kept tokens; equal scores go to the lower id.
        Log-probs are those of the logits as they came.

        Rows with penalties, biases, masks or typical-p (arguments.py) have their logits edited before
        all that, in this order: NaN becomes the lowest float, and what follows saturates at the
        largest; repetition, then frequency and presence; biases; what a bias of -inf or a mask
        forbids is never sampled. Where that would leave no token, biases of -inf do not count; where
        a mask allows none, it is token 0. Typical-p (Meister et al., 2023), where the temperature is
        not 0, keeps the first tokens that together reach p, ordered by |z - mean of z| of the
        tempered logits z, which is how far -log p is from the entropy; equal ones by id."""
        ...

    def score(self, logits_LV: F32, ids_L: I32, num_logprobs: int) -> SampleResult:
        """What `sample` would tell if it had sampled these."""
        ...


class Coming(Protocol):
    """What was sampled, on its way to the host."""

    @property
    def is_there(self) -> bool:
        """Reading it waits for nothing."""
        ...

    def result(self) -> SampleResult: ...


class SamplesAhead(Protocol):
    """What a provider offers besides where ops compute while the host goes on."""

    def sample_ahead(self, logits_LV: F32, args: SampleArgs) -> Coming:
        """`sample`, without waiting for it. Until the next one, ~k among the token ids of a batch that
        is uploaded stands for what row k samples here."""
        ...
