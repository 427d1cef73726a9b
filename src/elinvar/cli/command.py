"""What our commands add to click's: options in sections, and groups that import a command when it
is asked for, so that one command does not pay for the imports of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """`section`: the heading under which `--help` lists the option."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def option(*names: str, **settings: Any) -> Decorator:
    return click.option(*names, cls=Option, **settings)


def options(*several: Decorator) -> Decorator:
    """One decorator of several, which `--help` lists in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(several):
            function = one(function)
        return function

    return decorate


class Command(click.Command):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                # click makes --help itself, without a section.
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def command(function: Callable[..., Any]) -> Command:
    """The function as a command of its name. What it returns, if anything, is the exit code."""
    return click.command(cls=Command)(function)


class Group(click.Group):
    """`lazy`: names of commands, each in a module of its name (with _ for -) in the package `home`."""

    def __init__(self, *args: Any, home: str = "", lazy: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.home, self.lazy = home, lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        name = cmd_name.replace("-", "_")
        found: click.Command = getattr(import_module(f"{self.home}.{name}"), name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # which looked for what was meant among the imported
            known = self.list_commands(ctx)
            raise click.NoSuchCommand(error.command_name, possibilities=known, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each with the whole first paragraph of its help, which click would cut."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, " ".join((one.help or "").partition("\n\n")[0].split()))
                    for name, one in found.items()
                    if one is not None
                ]
            )
