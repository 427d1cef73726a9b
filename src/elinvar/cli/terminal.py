"""What the commands share at the terminal: colours, notes on stderr, bars and load progress."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from elinvar.base.errors import InputError


def styled(text: str, code: str, stream: TextIO) -> str:
    """`text` in an ANSI style (for example "31" for red) where `stream` shows styles."""
    plain = not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def note(text: str) -> None:
    """A quiet line for the person, never part of a command's output."""
    print(styled(text, "2", sys.stderr), file=sys.stderr, flush=True)


def fail(sentence: str, code: int = 1) -> int:
    """The one sentence of an error; returns the exit code."""
    sys.stdout.flush()
    print(styled(f"elinvar: {sentence}", "31", sys.stderr), file=sys.stderr, flush=True)
    return code


def read_text(path: Path | None = None) -> str:
    """What a file holds, or stdin; of the latter, lines end in "\\n". Raises InputError where it is
    not UTF-8, whatever the locale."""
    name = "stdin" if path is None else str(path)
    try:
        text = (sys.stdin.buffer.read() if path is None else path.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise InputError("file", f"{name} is not UTF-8 text: {error.reason}.") from None
    return io.StringIO(text, newline=None).read() if path is None else text


class Interrupt:
    """While the block runs, Ctrl-C sets `hit` instead of raising.

    A step must not be torn apart half-way, so loops over steps look at `hit` between them.
    """

    def __enter__(self) -> Interrupt:
        self.hit = False
        self._before = signal.signal(signal.SIGINT, self._set)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _set(self, signum: int, frame: object) -> None:
        self.hit = True


@contextmanager
def bar(
    text: str, total: float | None = None, shown: bool = True
) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr; yields update(completed, right-hand text).

    Shown on a terminal only: in a file or a pipe it would be noise. Not `shown`: where the block
    writes to the same terminal.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda completed, right: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[right]}"),
        TimeRemainingColumn(),
    )
    # Few refreshes: each one takes the interpreter from the steps. Nothing is redirected: results
    # on stdout stay there.
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task(text, total=total, right="")
        yield lambda completed, right: progress.update(task, completed=completed, right=right)
