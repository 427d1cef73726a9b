"""The sandbox that chat templates run in. Owns what a template may call and how much it may do.

Templates are programs that come with models. They see plain JSON values, cannot reach Python's
internals or other files, and end: loops and calls of macros are counted, and the operators that make
something huge of something small are limited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 300_000
"""Rounds of loops and calls of macros in one rendering; a long conversation takes thousands."""
_MAX_SIZE = 1 << 24
"""Characters or items that `*` may make, and bits of a number that `**` may."""
_STEPS = "steps!"
"""Where the count is kept: no name that a template could write."""


class Program:
    """A compiled template, what it reads from outside, and whether it takes content in parts."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError for what is no template, and SecurityError for one that wants other
        files."""
        environment = _Sandbox()
        tree = environment.parse(source)
        outside = (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)
        if any(tree.find(kind) for kind in outside):
            raise SecurityError("it imports from other files")
        self.variables = find_undeclared_variables(tree) - environment.globals.keys()
        """Names it reads that it does not define: messages, tools, enable_thinking, ..."""
        self.takes_parts = _takes_parts(tree)
        """Whether it goes through the parts of a message's content; else content must be a text."""
        repeated: list[nodes.For | nodes.Macro]
        repeated = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for node in repeated:
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        self._template: Template = environment.from_string(tree)

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises TemplateError, or what Python raises where values are of unexpected types."""
        return self._template.render({**values, _STEPS: [0]})


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox in the environment that Hugging Face promises to templates."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        # Without the optimiser, which would compute what is constant before anything is counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": _Namespace,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    @staticmethod
    @pass_context
    def step(context: Context) -> None:
        """Every round of a loop and every call of a macro comes through here."""
        count = context.parent[_STEPS]
        count[0] += 1
        if count[0] > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for sized, times in ((left, right), (right, left)):
            many = isinstance(sized, str | list | tuple) and isinstance(times, int)
            if operator == "*" and many and len(sized) * times > _MAX_SIZE:
                raise SecurityError("it makes something huge")
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > _MAX_SIZE:
            raise SecurityError("it makes a huge number")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """Without names that Python gives a meaning to."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **values):
            _check_name(name)
        Namespace.__init__(self, *rest, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")


class _Generation(Extension):
    """{% generation %} marks what the assistant says, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _takes_parts(tree: nodes.Template) -> bool:
    """Whether a loop goes through something called content, or through a variable set to it."""
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    filtered = node.node if isinstance(node, nodes.Filter) else None
    return filtered is not None and _is_content(filtered, names)
