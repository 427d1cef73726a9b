"""`elinvar bench`: three ways to measure speed, and the first is what `bench MODEL` means.

    elinvar bench MODEL           offline: prompt and decode tokens/s, all rows at once
    elinvar bench serve MODEL     requests that arrive as they do at a server: latencies, goodput
    elinvar bench kernels         no model: the matrix kernels against this machine's ceilings

Subcommands, as in `vllm bench latency|throughput|serve`: the three share a few flags and nothing
else, so flags that switch the mode would each be refused by the other two. The default keeps the
commonest measurement as short as llama-bench's; a model whose name is that of a subcommand is
written ./kernels, or `bench offline kernels`.
"""

from __future__ import annotations

import click

from elinvar.cli.command import Group

DEFAULT = "offline"


class _WithDefault(Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.list_commands(ctx), *ctx.help_option_names}:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithDefault, home=__name__, lazy=("offline", "serve", "kernels"))
def bench() -> None:
    """Measure speed. `elinvar bench MODEL` is short for `elinvar bench offline MODEL`."""
