"""What speculation gains on copying work and costs on free prose (docs/speculation.md).

    .venv/bin/python benchmarks/speculation.py smollm2-135m gemma3-270m
    .venv/bin/python benchmarks/speculation.py smollm2-135m --work json --drafters suffix
    .venv/bin/python benchmarks/speculation.py smollm2-135m --offline

Engines with it and two without take turns of a few steps and their tokens are compared; ratios are medians over
the rounds, with their range. --offline records the answers once and asks what chains and trees of drafts would
have come to, with steps of so many rows as this machine computes them. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from drafting.work import WORK

from drafting import live, offline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("models", nargs="+", help="as elinvar knows them, or paths")
    add(
        "--drafters",
        action="append",
        help='as --speculation takes them, "right" for one that knows what comes, or of tests/adversaries;'
        " may be repeated",
    )
    add("--draft-model", help="a smaller model, or a folder with heads")
    add("--work", action="append", choices=list(WORK), help="these kinds alone; may be repeated")
    add("--batch", action="append", type=int, help="rows; may be repeated (default: 1 and 8)")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, help="of the engines (default: the machine's)")
    add("--offline", action="store_true", help="chains and trees on recorded answers")
    add("--json", action="store_true", help="a line of JSON for each measurement")
    args = parser.parse_args()
    kinds = args.work or list(WORK)
    for model in args.models:
        if args.offline:
            lines, show, head = (
                offline.measure(model, kinds, args.threads),
                offline.show,
                offline.HEAD,
            )
        else:
            drafters, batches = args.drafters or ["suffix", "auto"], args.batch or [1, 8]
            lines = live.measure(
                model, drafters, kinds, batches, args.rounds, args.threads, args.draft_model
            )
            show, head = live.show, live.HEAD
        if not args.json:
            print(f"\n{model}\n\n{head}")
        for line in lines:
            print(json.dumps(line) if args.json else show(line), flush=True)


if __name__ == "__main__":
    main()
