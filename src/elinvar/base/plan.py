"""The plain data between scheduler and runner: ints, lists and strings, no arrays.

Plan: which rows compute which token spans and which blocks are new. Output: what was sampled.
A simulator can stand behind the same scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from elinvar.base.sampling import SamplingParams

MOST_BYTES = 64 << 20
"""Most that a step loads, and saves where nobody needs the blocks: some 15 ms, so that those who are
answered meanwhile hardly notice."""


@dataclass(slots=True)
class RowStart:
    """A request takes a row (for the first time, or again after preemption)."""

    request_id: str
    row: int
    token_ids: list[int]
    """All tokens known so far: the prompt, and after preemption what was sampled."""
    params: SamplingParams
    """`seed` is set: the engine drew one where the user gave none."""
    blocks: list[list[int]]
    """Per KV group: block ids from the start of the sequence, from the prefix cache; -1 where a
    sliding group needs none (it lies outside the window). Empty lists when nothing was found."""
    adapter: int = -1
    """Number of the adapter that the request runs with; -1: none."""
    num_prompt_tokens: int = 0
    """How many of token_ids are the prompt."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer."""
    namespace: bytes = b""
    """Whose texts it may be compared with: how fast an answer comes must tell nothing of others'."""


@dataclass(slots=True)
class PlanItem:
    """Row `row` computes the tokens at positions start .. start + num_tokens - 1."""

    request_id: str
    row: int
    start: int
    num_tokens: int
    sample: bool
    """Whether the span ends at the last known token, so that the next one is sampled."""
    new_blocks: list[list[int]]
    """Per KV group: block ids appended to the row's table before this step."""
    num_drafts: int = 0
    """There is room behind the span for so many guesses of what comes next, which the runner may
    verify in the same step."""


@dataclass(slots=True)
class Wave:
    """Chunks of prompts on their way through the model: in this step through the layers first ..
    end - 1. Each step of a wave has the same items; where the next plan's wave begins at layer 0, this
    one was given up."""

    items: list[PlanItem]
    first: int
    end: int
    is_last: bool
    """Behind those layers there is none, and what the items sample comes with this step."""


@dataclass(slots=True)
class BlockCopy:
    """Block `target` begins as `source` is: a sequence goes on amid a block that others hold."""

    group: int
    source: int
    target: int


@dataclass(slots=True)
class BlockMove:
    """Between block `block` and the memory below the provider's, where its content has `key`."""

    group: int
    block: int
    key: bytes


@dataclass(slots=True)
class StepPlan:
    """In this order: released_rows, saves, copies, loads, started, items, wave."""

    started: list[RowStart] = field(default_factory=list)
    items: list[PlanItem] = field(default_factory=list)
    """Compute their tokens in this step, all layers."""
    wave: Wave | None = None
    """None: one that was begun, if any, stands still in this step."""
    saves: list[BlockMove] = field(default_factory=list)
    """Contents that may be overwritten from now on."""
    loads: list[BlockMove] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    released_rows: list[int] = field(default_factory=list)
    """Rows of requests that finished, were cancelled or preempted since the last plan."""
    is_ahead: bool = False
    """Made before the tokens of the plan before were known: each of its rows goes on by the token that
    it samples there."""

    @property
    def is_empty(self) -> bool:
        """There is nothing to execute."""
        return not (self.items or self.wave or self.loads or self.saves)

    @property
    def results(self) -> list[PlanItem]:
        """What is computed when the step is."""
        wave = self.wave
        return self.items + wave.items if wave is not None and wave.is_last else self.items

    @property
    def touched(self) -> list[PlanItem]:
        """What the step computes some of."""
        return self.items if self.wave is None else self.items + self.wave.items

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.results)


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probs of one token, of the softmax over the raw logits (temperature 1)."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, most likely first; equal ones by token id."""


@dataclass(slots=True)
class StepOutput:
    """Parallel to StepPlan.results; entries of items that sample nothing are empty."""

    sampled: list[list[int]]
    """Of an item with drafts those that were right, and the token after them."""
    logprobs: list[list[TokenLogprobs]]
    """Empty lists for requests that asked for none."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By the number of an item: of the prompt's tokens that follow those it computed."""
    lost: list[bytes] = field(default_factory=list)
    """Keys of the plan's loads that were not there any more, or damaged."""
    moving_s: float = 0.0
    """Seconds that saves and loads took."""
    step_s: float | None = None
    """Of a plan that was ahead: seconds since the step before it, where steps took all of them."""
    layer_s: list[float] = field(default_factory=list)
    """Seconds that each layer of the plan's wave took."""
    kept: dict[int, list[int]] = field(default_factory=dict)
    """By the index of an item which ends a prompt that is seen in part from now on: the blocks of it
    that are seen, by their places in the row's tables."""
    num_drafted: dict[int, int] = field(default_factory=dict)
    """By the index of an item: how many drafts were verified."""
    failed: dict[str, str] = field(default_factory=dict)
    """Requests that cannot go on, which got no token, and why."""
