"""`elinvar embed`: vectors of texts, as JSON lines on stdout or in a NumPy file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from elinvar.base.errors import InputError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import bar, note, read_text


@command
@opt.model
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@option(
    "--file",
    type=opt.FILE,
    help='JSONL: a line holds a text, or an object with "text" and "id" as you like (- reads stdin).',
)
@option("--output", type=opt.FILE, metavar="X.npy", help="Write one array instead of JSON.")
@option("--json", "as_json", is_flag=True, help="One JSON object instead of a line a text.")
@option("--prompt", metavar="TEXT", help="Put before each text.")
@option("--prompt-name", metavar="NAME", help="The same, one that the model brings: query, ...")
@option(
    "--dimensions",
    type=opt.AT_LEAST_1,
    metavar="N",
    help="Keep the first N numbers, of models that were trained for it.",
)
@opt.embedding
@opt.verbose
def embed(
    model: str,
    texts: tuple[str, ...],
    file: Path | None,
    output: Path | None,
    as_json: bool,
    no_truncate: bool,
    **flags: Any,
) -> None:
    """Turn texts into vectors; a TEXT - is read from stdin.

    Results are in the order of the texts."""
    if bool(texts) == (file is not None):
        raise click.BadParameter("give either texts or --file")
    if None not in (flags["prompt"], flags["prompt_name"]):
        raise click.BadParameter("give either --prompt or --prompt-name")
    if output is not None and not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.absolute().parent}")
    entries = _read(file) if file else [{"text": read_text() if t == "-" else t} for t in texts]

    from elinvar.cli.load import load_embedder

    embedder = load_embedder(model, opt.engine_config(flags))
    keep = as_json or output is not None
    vectors, num_tokens, num_cut = [], 0, 0
    start = time.perf_counter()
    with bar("Embedding", len(entries), keep or not sys.stdout.isatty()) as update:
        found = embedder.stream(
            [entry["text"] for entry in entries],
            prompt=flags["prompt"],
            prompt_name=flags["prompt_name"],
            dimensions=flags["dimensions"],
            truncate=not no_truncate,
            progress=lambda done: update(done, f"{done}/{len(entries)}"),
        )
        for index, (entry, one) in enumerate(zip(entries, found, strict=True)):
            num_tokens += one.num_tokens
            num_cut += one.truncated
            if keep:
                vectors.append(one.vector)
            else:
                line = {"index": index} | ({"id": entry["id"]} if "id" in entry else {})
                line |= {"num_tokens": one.num_tokens, "truncated": one.truncated}
                print(json.dumps(line | {"embedding": one.vector.tolist()}))
    if output is not None:
        import numpy as np

        with output.open("wb") as sink:
            np.save(sink, np.stack(vectors))
    if as_json:
        values = {"model": model, "num_tokens": num_tokens, "num_truncated": num_cut}
        if output is None:
            values |= {"embeddings": [vector.tolist() for vector in vectors]}
        print(json.dumps(values))
    seconds = time.perf_counter() - start
    cut = f", {num_cut} cut to {embedder.model.max_tokens} tokens" if num_cut else ""
    done = f"{_counted(len(entries), 'text')}{cut}, {_counted(num_tokens, 'token')}"
    note(f"{done} in {seconds:.2f} s")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _read(path: Path) -> list[dict[str, Any]]:
    """Raises InputError naming the first bad line."""
    text = read_text(None if str(path) == "-" else path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError("file", f"{path} holds no text; write one JSON text or object a line.")
    return list(_parsed(path, lines))


def _parsed(path: Path, lines: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        entry = {"text": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise InputError(
                "file",
                f"Bad line {number} of {path}: it must be a JSON text, or an object such as "
                '{"text": "Hello"}.',
            )
        yield entry
