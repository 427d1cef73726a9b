"""The `elinvar` command as a process, and how it must end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ELINVAR = str(Path(sys.executable).with_name("elinvar"))
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [ELINVAR, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )


def assert_fails(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One sentence on stderr that holds all the words, nothing on stdout, no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("elinvar: ") and lines[0].endswith(".")
    for word in words:
        assert word in lines[0]
