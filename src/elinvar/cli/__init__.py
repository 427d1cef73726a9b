"""The `elinvar` command: registers the commands, turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 a user's error (one sentence on stderr), 2 a mistake in the command line,
130 after Ctrl-C. Commands live in one file each, which is imported when the command is asked for,
and import what is heavy inside their function, so that `elinvar --help` stays instant.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import click

from elinvar import __version__
from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.command import Group
from elinvar.cli.terminal import fail


@click.group(
    cls=Group,
    home=__name__,
    lazy=(
        *("pull", "generate", "chat", "embed", "rerank", "serve", "top", "keys"),
        *("profile", "plan", "tune", "doctor", "models", "bench", "kv-server", "draft"),
    ),
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@opt.verbose
@click.version_option(__version__, message="elinvar %(version)s", help="Print and exit.")
def app() -> None:
    """Serves language models with results that do not depend on how the work was scheduled."""


def main() -> NoReturn:
    """Entry point of the console script."""
    # A plain `kill` unwinds like Ctrl-C does: finished results are written, files are closed.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(sys.argv[1:] or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        code: Any = app(arguments, prog_name="elinvar", standalone_mode=False)
    except click.ClickException as error:
        return fail(_sentence(error.format_message()), code=error.exit_code)
    except click.Abort:
        return 130
    except ElinvarError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("elinvar"):
            raise
        return fail(f"The package {error.name} is missing; 'elinvar doctor' tells what mends it.")
    except OSError as error:
        if error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        return fail(f"{error.strerror}{where}.")
    return code if isinstance(code, int) else 0


def _sentence(message: str) -> str:
    """click's usage errors, on one line and with where to look."""
    text = " ".join(message.split()).rstrip(".")
    stop = "" if text.endswith("?") else "."
    return f"{text}{stop} See 'elinvar --help' and 'elinvar COMMAND --help'."


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)
