"""The sandbox that chat templates run in. Owns what a template may call and how much it may do.

Templates are programs that come with models. They see plain JSON values, cannot reach Python's
internals or other files, and end: loops, calls of macros and the text that is made are counted, and
sandbox_sizes.py refuses what makes something huge of something small.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from elinvar.engine import sandbox_sizes as sizes

_NOT_OFFERED = frozenset(("encode", "to_bytes", "translate", "pprint", "urlize"))
"""Methods and filters that no prompt needs: bytes, tables of characters, layouts of any depth."""


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
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            step = _call("step", [nodes.Const(text)])
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        self._template: Template = environment.from_string(_Joins().visit(tree))

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises TemplateError, or what Python raises where values are of unexpected types."""
        with sizes.counting():
            return self._template.render(values)


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


class _Joins(NodeTransformer):
    """Makes every `~` a call, so that it is counted."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("tilde", node.nodes).set_lineno(node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox in the environment that Hugging Face promises to templates."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Without the optimiser, which would compute what is constant before anything is counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_written,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.filters = {
            name: _bounded(name, function)
            for name, function in self.filters.items()
            if name not in _NOT_OFFERED
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": _Namespace,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    step = staticmethod(sizes.step)
    """Every round of a loop and every call of a macro comes through here."""

    @staticmethod
    def tilde(*values: Any) -> str:
        sizes.allow(sizes.weight(values))
        return "".join(map(str, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NOT_OFFERED and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form, formatter = value.__self__, _Formatter(self)
        if isinstance(form, Markup):
            formatter = _EscapeFormatter(self, escape=form.escape)

        def write(*args: Any, **values: Any) -> str:
            if value.__name__ == "format_map":
                (values,), args = args, ()
            return type(form)(formatter.vformat(form, args, values))

        return write

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join" and args and isinstance(args[0], Iterator):
                args = (list(args[0]), *args[1:])
            sizes.allow_method(__obj.__name__, owner, args, named)
        return sizes.made(super().call(__context, __obj, *args, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes.allow_operator(operator, left, right)
        return sizes.made(super().call_binop(context, operator, left, right))


@pass_context  # else constants would be written when the template is compiled
def _written(_context: Context, value: Any) -> Any:
    """What {{ }} writes."""
    sizes.allow(sizes.weight(value))
    return sizes.made(value)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def bounded(*args: Any, **named: Any) -> Any:
        value = args[first]
        if name in ("join", "sum") and isinstance(value, Iterator):
            value = list(value)
        sizes.allow_filter(name, value, args[first + 1 :], named)
        return sizes.made(function(*args[:first], value, *args[first + 1 :], **named))

    return bounded


class _Formatter(SandboxedFormatter):
    """str.format, field by field."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        found = super().get_field(field_name, args, kwargs)
        sizes.allow(sizes.weight(found[0]))
        return found

    def format_field(self, value: Any, format_spec: str) -> str:
        sizes.allow(sizes.widths(format_spec))
        return str(sizes.made(super().format_field(value, format_spec)))


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """That of a Markup."""


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

    def __repr__(self) -> str:
        return "<Namespace>"  # what is in it may be in it many times


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
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # Counted by pieces: what is deep has much indentation.
    return "".join(map(sizes.made, encoder.iterencode(value)))


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
