"""`elinvar bench`: three ways to measure speed, and the first is what `bench MODEL` means.

    elinvar bench MODEL           offline: prompt and decode tokens/s, all rows at once
    elinvar bench online MODEL    requests that arrive as they do at a server: latencies, goodput
    elinvar bench kernels         no model: the matrix kernels against this machine's ceilings

Subcommands, as in `vllm bench latency|throughput|serve`: the three share a few flags and nothing
else, so flags that switch the mode would each be refused by the other two. The default keeps the
commonest measurement as short as llama-bench's; a model whose name is that of a subcommand is
written ./kernels, or `bench offline kernels`.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from elinvar.cli.bench.kernels import kernels
from elinvar.cli.bench.offline import offline
from elinvar.cli.bench.online import online

DEFAULT = "offline"


class _WithDefault(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_WithDefault,
    help="Measure speed. `elinvar bench MODEL` is short for `elinvar bench offline MODEL`.",
)
for command in (offline, online, kernels):
    bench_app.command()(command)
