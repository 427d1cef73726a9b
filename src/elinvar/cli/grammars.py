"""Options that keep an answer to a format."""

from __future__ import annotations

from pathlib import Path

import click

from elinvar.base.grammar import Grammar, JsonSchema, Lark, Regex
from elinvar.cli.command import option, options
from elinvar.cli.options import FILE_THAT_IS_THERE
from elinvar.cli.terminal import read_text

grammar = options(
    option(
        "--json-schema",
        "schema_file",
        type=FILE_THAT_IS_THERE,
        help="The answer is a JSON value that this schema describes.",
    ),
    option("--regex", metavar="PATTERN", help="The answer matches it as a whole."),
    option(
        "--grammar",
        "grammar_file",
        type=FILE_THAT_IS_THERE,
        help="The answer follows this grammar, in Lark's notation or in GBNF.",
    ),
)


def asked_grammar(
    schema_file: Path | None, regex: str | None, grammar_file: Path | None
) -> Grammar | None:
    """What the options ask for. Raises click.BadParameter where several do."""
    given: list[Grammar] = []
    if schema_file is not None:
        given.append(JsonSchema(read_text(schema_file)))
    if regex is not None:
        given.append(Regex(regex))
    if grammar_file is not None:
        given.append(Lark(read_text(grammar_file)))
    if len(given) > 1:
        raise click.BadParameter("give one of --json-schema, --regex and --grammar")
    return given[0] if given else None
