"""Frozen configuration: what a model is (ModelConfig) and how it is run (EngineConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from elinvar.base.drafts import DRAFTERS, OF_DRAFT_MODELS
from elinvar.base.errors import InputError
from elinvar.base.limits import BATCH, INTERACTIVE, Target, TenantLimits, check_positive

LayerKind = Literal["full", "sliding", "chunked", "linear"]
"""Attention to every key, to a window, to a chunk; linear attention, which keeps a state instead."""
KVDtype = Literal["f16", "bf16", "f32", "int8", "fp8"]
"""Of int8 each key and each value of a head has a scale of its own (ops.api.Ops.rope_write)."""
Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "swiglu_oai"]
"""Of an MLP: x sigmoid(x); x Phi(x) with Phi by tanh (Hendrycks and Gimpel, 2016), and the exact
one; max(x, 0)^2; y sigmoid(1.702 y) with y = min(x, 7), which multiplies 1 + up, up within -7 .. 7
(gpt-oss). Kernels number them in this order."""
Scoring = Literal["softmax", "sigmoid"]
"""How a mixture of experts turns router logits into scores."""
WeightFormat = Literal["auto", "f32"]
Device = Literal["cpu", "cuda", "ref"]
PolicyName = Literal["fcfs", "priority", "fair", "deadline"]
"""Who goes first: see sched.policy."""

BLOCK_SIZE = 32
"""Tokens a KV block. Part of `attention`'s definition: block borders are absolute positions."""
MAX_THREADS = 1024
"""More compute threads than a machine has CPUs for; a system may refuse to start more."""


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN (Peng et al., 2023): frequencies that turn fewer than beta_slow times in the original
    context are divided by `factor`, those that turn more than beta_fast times stay, between is a
    blend. `truncate` widens the blend to whole frequencies."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one layer kind, on the first `dim` dims of a head (0: no positions).

    inv_freq_i = base ** (-2 i / dim) / factor; with `llama3` set, frequencies are scaled by
    wavelength as in Llama 3.1: (factor, low_freq_factor, high_freq_factor, original_context); or
    by `yarn`; `divisors` (one a frequency: a GGUF's rope_freqs.weight, or LongRoPE's factors)
    divide them last. Cosines and sines are multiplied by `attention_factor`.
    """

    base: float
    dim: int
    factor: float = 1.0
    llama3: tuple[float, float, float, int] | None = None
    divisors: tuple[float, ...] | None = None
    yarn: YarnConfig | None = None
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TemperatureConfig:
    """Factors on queries that grow with their position p (Nakanishi, 2025; Llama 4):
    1 + scale * ln(1 + floor((p + offset) / length))."""

    scale: float
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (nn/mla.py). The cache holds one key for all heads: a latent of
    `rank` dims and `rope_dim` rotated ones, together ModelConfig.head_dim."""

    rank: int
    nope_dim: int
    """Dims of a query's head that are not rotated, before they are multiplied to `rank` dims."""
    rope_dim: int
    value_dim: int
    """Of a head, after the latent was multiplied."""
    q_rank: int | None = None
    """Dims that queries go through on their way from the stream; None: straight."""


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """Sparse attention over latents (nn/indexed.py): each token attends to the `top_k` keys that an
    index of a few small heads finds worth most."""

    heads: int
    head_dim: int
    top_k: int
    layers: tuple[int, ...]
    """Those with an index; the others attend to what the one before them chose."""


@dataclass(frozen=True, slots=True)
class StreamsConfig:
    """Several streams side by side (nn/streams.py)."""

    num_streams: int
    rank: int
    """Of the projection around attention."""
    own_dim: int
    """Of the embeddings that each layer has of its own."""
    own_vocab: int
    """Rows of those; other tokens have that of token 0."""
    kv_layers: int
    """Layers with keys and values. Those after them read what the last one of their kind wrote."""
    deviations: tuple[float | None, ...]
    """Of each layer: an MLP's activations begin so many standard deviations above their mean."""
    scaled: bool
    """Whether the first stream is multiplied by gains where it meets a layer's own embedding."""


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Gated delta-net layers (nn/delta.py). What they keep of a sequence is its state: a matrix
    [key_dim, value_dim] a head and the last inputs of a convolution, all in f32."""

    key_heads: int
    heads: int
    """Of values; each key head serves so many of them that lie together."""
    key_dim: int
    """Of a head."""
    value_dim: int
    taps: int
    """Inputs that the convolution sees, the present one among them."""

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def padded_dim(self) -> int:
        """Columns of a matrix, where each row begins a cache line."""
        return -(-self.value_dim // 16) * 16

    @property
    def tail_floats(self) -> int:
        return -(-(self.taps - 1) * self.channels // 16) * 16

    @property
    def state_floats(self) -> int:
        return self.tail_floats + self.heads * self.key_dim * self.padded_dim


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The mixture of experts that some layers have in the place of an MLP; what routing means says
    ops.api.Ops.route."""

    num_experts: int
    top_k: int
    """Experts that a token goes to."""
    ff_dim: int
    """Of each."""
    layers: tuple[int, ...]
    """Those with experts; the others have an MLP."""
    scoring: Scoring = "softmax"
    renormalise: bool = False
    scaling: float = 1.0
    biased: bool = False
    """Whether a bias takes part in the choice."""
    num_groups: int = 1
    top_groups: int = 1
    shared_ff_dim: int = 0
    """Of the expert that every token goes through; 0: there is none."""
    shared_gate: bool = False
    """Whether that one's output is weighted by a sigmoid of its own."""
    scale_inputs: bool = False
    """Whether weights multiply what an expert sees, not what it gives."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What encoders have and decoders have not (nn/encoder.py)."""

    num_types: int = 1
    """Kinds of tokens that the model tells apart: of a first and of a second text, usually."""
    first_position: int = 0
    """Row of the table of positions that the first token has."""
    num_labels: int = 0
    """Scores of the classification head; 0: there is none."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a text model, the same whether it came from GGUF or from config.json."""

    family: str
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_dim: int
    max_context: int
    norm_eps: float
    layer_kinds: tuple[LayerKind, ...]
    """One entry a layer."""
    rope: dict[LayerKind, RopeConfig]
    attn_scale: float
    """Factor on q·k, usually head_dim ** -0.5."""
    window: int | None = None
    """Sliding layers: a query at position p sees keys p - window + 1 .. p."""
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on what a layer adds to the stream."""
    logit_scale: float = 1.0
    activation: Activation = "silu"
    parallel: bool = False
    """Attention and MLP of a layer both see its input."""
    tied_head: bool = False
    attn_softcap: float | None = None
    """Attention scores s become cap * tanh(s / cap)."""
    final_softcap: float | None = None
    """The same of the logits."""
    attn_chunk: int | None = None
    """Chunked layers: a query at position p sees keys p // chunk * chunk .. p."""
    unrotated: tuple[int, ...] = ()
    """Layers without positions, though others of their kind have some."""
    moe: MoEConfig | None = None
    latent: LatentConfig | None = None
    delta: DeltaConfig | None = None
    """Of the linear layers."""
    encoder: EncoderConfig | None = None
    """None: a decoder."""
    streams: StreamsConfig | None = None
    temperature: dict[LayerKind, TemperatureConfig] = field(default_factory=dict)
    """Of the layer kinds that have one."""
    unit_heads: bool = False
    """Heads of q and k are normed without gains, in layers that rotate them."""
    index: IndexConfig | None = None
    mtp_layers: int = 0
    """Heads beside the model that predict further tokens (nn/mtp.py)."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """KV cache of one layer kind: its layers share block ids, each has its own arrays."""

    kind: LayerKind
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: KVDtype = "f16"
    window: int | None = None
    block_size: int = BLOCK_SIZE
    latent_dim: int | None = None
    """Set: so many first dims of a key are its value too, which is not stored again."""
    state: DeltaConfig | None = None
    """Set: layers with a recurrent state. A block is the state after the last computed of its
    positions, so a sequence goes on from one block, and those before it are snapshots."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all the layers of this kind."""
        if self.state is not None:
            return len(self.layers) * self.state.state_floats * 4
        arrays = 1 if self.latent_dim else 2
        return len(self.layers) * arrays * self.num_kv_heads * self.head_bytes

    @property
    def padded_dim(self) -> int:
        """Dims of a value where each begins a vector of 16."""
        return -(-self.head_dim // 16) * 16

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's keys, or values, in a block."""
        size = {"f16": 2, "bf16": 2, "f32": 4, "int8": 1, "fp8": 1}[self.dtype]
        scale = 4 if self.dtype == "int8" else 0
        return self.block_size * (self.padded_dim * size + scale)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run. None of these may change a token or a log-prob, but `device`,
    `weight_format` and `kv_dtype`. Raises InputError naming the field when a value is out of range;
    whether the sizes fit the model is seen when it is loaded."""

    device: Device = "cpu"
    """`cuda` is a GPU, of NVIDIA or AMD, the first that is visible; `ref` the slow oracle."""
    num_threads: int | None = None
    """Compute threads; None: the CPUs this process may use."""
    kv_dtype: KVDtype = "f16"
    weight_format: WeightFormat = "auto"
    """`auto` keeps the file's precision; `f32` dequantises everything."""
    kv_memory: int | None = None
    """Bytes for the KV cache; None: a share of the free memory (see engine.plan_kv)."""
    max_context: int | None = None
    """Longest sequence, prompt and answer; None: the model's own."""
    max_rows: int = 256
    """Requests running at once."""
    max_step_tokens: int = 512
    """Token budget of one step: decode rows first, the rest goes to prompts."""
    prefix_cache: bool = True
    kv_host_memory: int | None = None
    """Bytes of host memory for contents of blocks that the KV cache has no room for; None: none, or
    what the places of `kv_tiers` need."""
    kv_host_path: str | None = None
    """File, best in /dev/shm, that keeps them when the engine ends, however it ends."""
    kv_tiers: tuple[str, ...] = ()
    """Places below host memory, the nearest first: see kv.tiers.places."""
    kv_disk_size: int | None = None
    """Bytes of a folder among them."""
    max_adapters: int = 16
    """LoRA adapters in memory at once."""
    policy: PolicyName = "fcfs"
    ageing_s: float = 10.0
    """Where the policy is `priority`: seconds of waiting that are worth one level."""
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict, hash=False)
    """By name; `*`: each of those not named. Without either a tenant has no limits."""
    interactive: Target = INTERACTIVE
    batch: Target = BATCH
    speculation: str = "auto"
    """Who guesses tokens ahead, for the model to verify several in a step: `auto`, whoever is there;
    `off`; or names of base.drafts.DRAFTERS, with commas between."""
    draft_model: str | None = None
    """A smaller model, or heads for this one, that drafts."""
    max_drafts: int = 16
    """Of a request in a step, at most."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("device", Device),
            ("kv_dtype", KVDtype),
            ("weight_format", WeightFormat),
            ("policy", PolicyName),
        ):
            known = get_args(choices)
            if getattr(self, name) not in known:
                raise InputError(
                    name, f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.kv_dtype == "fp8" and self.device != "cuda":
            raise InputError(
                "kv_dtype", "kv_dtype fp8 is for GPUs alone; int8 takes as little memory here."
            )
        optional_sizes = "num_threads", "kv_memory", "max_context", "kv_host_memory", "kv_disk_size"
        sizes = "max_rows", "max_step_tokens", "max_adapters", "max_drafts"
        for name in (*optional_sizes, *sizes):
            value = getattr(self, name)
            optional = name in optional_sizes
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(name, f"{name} must be a whole number above 0, got {value!r}.")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise InputError(
                "num_threads",
                f"num_threads must be at most {MAX_THREADS}, got {self.num_threads}.",
            )
        check_positive("ageing_s", self.ageing_s)
        for drafter in self.drafters or ():
            if drafter not in DRAFTERS:
                raise InputError(
                    "speculation",
                    f"speculation must be auto, off, or of {', '.join(DRAFTERS)} with commas between, "
                    f"got {self.speculation!r}.",
                )
        named = [name for name in self.drafters or () if name in OF_DRAFT_MODELS]
        if named and self.draft_model is None:
            message = f"speculation names {' and '.join(named)}: give a draft_model, too."
            raise InputError("speculation", message)
        if self.draft_model is not None and self.drafters == ():
            raise InputError(
                "draft_model", "A draft_model drafts nothing where speculation is off."
            )
        if self.kv_host_path is not None and self.kv_host_memory is None:
            raise InputError(
                "kv_host_memory",
                "kv_host_path needs kv_host_memory: a file is found again at the size that it had.",
            )
        if not self.prefix_cache and (self.kv_host_memory or self.kv_tiers):
            raise InputError(
                "kv_host_memory" if self.kv_host_memory else "kv_tiers",
                "Contents of blocks are kept to be found again, and prefix_cache is off.",
            )

    @property
    def uses_draft_model(self) -> bool:
        named = self.drafters is None or not set(OF_DRAFT_MODELS).isdisjoint(self.drafters)
        return self.draft_model is not None and named

    @property
    def drafters(self) -> tuple[str, ...] | None:
        """By name; None: whoever is there."""
        if self.speculation in ("auto", "off"):
            return None if self.speculation == "auto" else ()
        return tuple(dict.fromkeys(name.strip() for name in self.speculation.split(",")))
