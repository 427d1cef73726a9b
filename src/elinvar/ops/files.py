"""Questions to the file system of which Python, one at a time, gives up the GIL for each."""

from __future__ import annotations

import os
from collections.abc import Sequence

from elinvar import _cpu


def exist(paths: Sequence[str]) -> list[bool]:
    """Whether there is a file of each name."""
    return _cpu.exist([os.fsencode(path) for path in paths])
