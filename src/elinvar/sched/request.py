"""Request: what the scheduler knows of one sequence. There are no phases, only the difference
between the tokens that are known and those that are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from elinvar.base.handling import NO_WISHES, Handling
from elinvar.base.plan import BlockMove, TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.kv.sequence import SequenceKV
from elinvar.kv.session import Session
from elinvar.sched.ledger import Ledger

if TYPE_CHECKING:
    from elinvar.sched.tenants import Account

FinishReason = Literal["stop", "length", "abort"]


class Status(Enum):
    WAITING = "waiting"
    """Holds no row and no block: new, or preempted."""
    RUNNING = "running"
    """Holds a row."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to continue. The caller gives the fields up to `handling`; the scheduler writes
    the rest. Times are seconds of the scheduler's clock."""

    id: str
    token_ids: list[int]
    """All known tokens: the prompt, then what was sampled."""
    params: SamplingParams
    adapter: int = -1
    """Number of the adapter that it runs with; -1: none."""
    namespace: bytes = b""
    """What its cached blocks depend on besides its tokens: the adapter's content, the tenant."""
    handling: Handling = NO_WISHES

    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    """Leading tokens whose K and V are in the cache."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request first got a row."""
    loads: list[BlockMove] = field(default_factory=list)
    """What is yet to be copied of its cached prefix."""
    is_loading: bool = False
    """Its cached prefix is not all there, or not known to be."""
    in_wave: bool = False
    """A chunk of it is on its way through the layers."""
    patience: int = 64
    """Steps that it will still wait for another to compute what they begin with."""
    max_total_tokens: int = 0
    """The request ends when it has this many tokens."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it."""
    status: Status = Status.WAITING
    row: int = -1
    kv: SequenceKV = field(init=False)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Where asked for: of the prompt's tokens from the second on, as far as they are known."""
    num_drafted: int = 0
    """Guesses of its tokens that were verified."""
    num_accepted: int = 0
    """And those that were right."""
    num_preemptions: int = 0
    num_reached_tokens: int = -1
    """Most that were computed when it was preempted: until there are more it is not again."""

    order: int = -1
    """Number of arrival."""
    account: Account = field(init=False)
    """Its tenant's."""
    session: Session | None = None
    is_batch: bool = field(init=False)
    sees_part: bool = field(init=False)
    """Its answer sees a part of its prompt alone."""
    place: float = 0.0
    """Among others of its class: the policy's word (see sched.policy)."""
    arrival: float = 0.0
    """When it was asked for, where the caller knows; 0: when it is added."""
    ledger: Ledger = field(init=False)
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.is_batch = self.handling.service == "batch"
        self.sees_part = self.params.kept_of_prompt(self.num_prompt_tokens) is not None

    @property
    def key(self) -> tuple[bool, float, int]:
        """The order that never changes."""
        return self.is_batch, self.place, self.order

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def reads_all(self) -> bool:
        """Its next tokens see the whole prompt, of which its answer will see a part."""
        return self.sees_part and self.num_computed_tokens < self.num_prompt_tokens

    @property
    def reach(self) -> int:
        """Where its next span ends at the latest: an answer that sees less than its prompt did is
        computed when that has been."""
        return self.num_prompt_tokens if self.reads_all else len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(slots=True)
class RequestUpdate:
    """What a committed step brought to one request."""

    request: Request
    new_token_ids: list[int]
    """Includes the token that ended the request, if one did."""
    logprobs: list[TokenLogprobs]
    """One entry a new token, or none when the request asked for none."""
    finished: bool
