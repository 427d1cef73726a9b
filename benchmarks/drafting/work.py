"""Kinds of work: copying ones, and free prose, on which drafts from copies can only lose.

Small models follow examples, not orders, so each prompt shows one whole example of its kind. Texts are
real: functions of Python's standard library, pages of docs/, and letters made from lists.
"""

from __future__ import annotations

import base64
import colorsys
import difflib
import functools
import getopt
import gettext
import glob
import heapq
import inspect
import ipaddress
import json
import linecache
import random
import re
import shlex
import shutil
import statistics
import tempfile
import textwrap
import tokenize
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from elinvar.base.grammar import JsonSchema
from elinvar.base.sampling import SamplingParams

DOCS = Path(__file__).resolve().parents[2] / "docs"
MAX_TOKENS = 192
FEW, MOST = 8, 24
"""Tasks of a kind."""


@dataclass(frozen=True, slots=True)
class Task:
    prompt: str
    params: SamplingParams


def _greedy(**wishes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0, seed=0, **wishes)


# ---- edit this code --------------------------------------------------------------------------------

_CODE: list[tuple[Callable[..., Any], str, str]] = [
    (colorsys.rgb_to_hsv, "maxc", "highest"),
    (textwrap.indent, "predicate", "wanted"),
    (colorsys.rgb_to_hls, "sumc", "total"),
    (textwrap.dedent, "margin", "indent"),
    (shlex.split, "comments", "remarks"),
    (heapq.merge, "reverse", "downward"),
    (difflib.get_close_matches, "cutoff", "least"),
    (heapq.nsmallest, "result", "found"),
    (statistics.fmean, "weights", "shares"),
    (urllib.parse.unquote, "encoding", "charset"),
    (functools.update_wrapper, "wrapped", "inner"),
    (tempfile.mkdtemp, "suffix", "ending"),
    (ipaddress.ip_network, "strict", "exact"),
    (gettext.find, "languages", "tongues"),
    (linecache.checkcache, "entry", "record"),
    (base64.b64decode, "altchars", "others"),
    (shutil.copymode, "follow_symlinks", "through_links"),
    (tokenize.untokenize, "iterable", "source"),
    (difflib.restore, "which", "side"),
    (statistics.covariance, "xbar", "meanx"),
    (tempfile.mkstemp, "prefix", "opening"),
    (statistics.multimode, "counts", "tally"),
    (getopt.getopt, "longopts", "names"),
    (glob.iglob, "root_dir", "base"),
    (urllib.parse.urldefrag, "frag", "anchor"),
]


def _code(number: int) -> tuple[str, str, str, str]:
    """Its name, a function, a word of it, and another for it."""
    function, old, new = _CODE[number % len(_CODE)]
    lines = inspect.getsource(function).rstrip().splitlines()
    return function.__name__, "\n".join(lines[:40]), old, new


def _renamed(code: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, code)


def _edit(number: int) -> str:
    _, code, old, new = _code(number)
    return (
        f"### Task\nIn this code, rename `{old}` to `{new}`. Write the whole code.\n\n"
        f"```python\n{code}\n```\n\n### Answer\n```python\n"
    )


def edits() -> Iterator[Task]:
    """A function with one name changed."""
    _, code, old, new = _code(0)
    example = f"{_edit(0)}{_renamed(code, old, new)}\n```\n\n"
    for number in range(1, MOST + 1):
        yield Task(example + _edit(number), _greedy(stop=("```",)))


# ---- summarise with quotes -------------------------------------------------------------------------

_PAGES = (
    *("002", "003", "005", "006", "009", "015", "017", "019", "024", "030", "007", "008", "010"),
    *("020", "021", "022", "025", "028", "031", "036", "038", "039", "041", "045", "012"),
)


def _sentences(page: str) -> list[str]:
    """The first six of a page."""
    (path,) = DOCS.glob(f"design/{page}-*.md")
    plain = [p for p in path.read_text().split("\n\n") if p[0].isalpha()]
    found = re.split(r"(?<=[.:?]) (?=[A-Z])", " ".join(" ".join(plain).split()))
    return [one for one in found if 40 < len(one) < 300][:6]


def _quoting(sentences: list[str]) -> str:
    return f"### Text\n{' '.join(sentences)}\n\n### Summary with quotes\n"


def quotes() -> Iterator[Task]:
    """What a text says, with sentences of it."""
    first = _sentences(_PAGES[0])
    shown = (
        f'The text begins: "{first[0]}" It goes on: "{first[1]}" Then it explains: "{first[2]}" '
        f'The end of it is: "{first[-1]}"\n\n'
    )
    for page in _PAGES[1 : MOST + 1]:
        yield Task(_quoting(first) + shown + _quoting(_sentences(page)), _greedy(stop=("###",)))


# ---- extract JSON ----------------------------------------------------------------------------------

_FIRST = ["Ingrid", "Sergio", "Marie-Claire", "Tomasz", "Aoife", "Benedikt", "Yuki", "Rosalind"]
_LAST = [
    "Haugland",
    "Castellanos",
    "Dubois",
    "Wojciechowski",
    "O'Sullivan",
    "Achterberg",
    "Takahashi",
    "Fairweather",
]
_STREETS = "Lindenallee", "Calle de la Princesa", "Rue du Faubourg", "Parkgade", "Mill Lane"
_GOODS = "walnut writing desk", "pair of brass lamps", "wool carpet", "set of oak chairs", "mirror"
_FIELDS = "customer", "street", "order_number", "item", "email"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 60} for name in _FIELDS},
        "required": list(_FIELDS),
        "additionalProperties": False,
    }
)


def _letter(rng: random.Random) -> tuple[str, dict[str, str]]:
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    found = {
        "customer": f"{first} {last}",
        "street": f"{rng.choice(_STREETS)} {rng.randrange(1, 200)}",
        "order_number": f"{rng.choice('ABCDEF')}{rng.randrange(10**6, 10**7)}-{rng.randrange(100)}",
        "item": rng.choice(_GOODS),
        "email": f"{first}.{last}@{rng.choice(['posthuset', 'correo', 'laposte'])}.example".lower(),
    }
    text = (
        f"Dear sirs, under the number {found['order_number']} I ordered a {found['item']} from you three "
        f"weeks ago. It has not come yet. Please send it to {found['street']}, where I live now, and "
        f"write to {found['email']} when it is on its way. Yours, {found['customer']}"
    )
    return text, found


def extractions(examples: int = 2) -> Iterator[Task]:
    """Fields of a letter, by a schema."""
    rng = random.Random(4)
    for _ in range(MOST):
        shown = []
        for _ in range(examples):
            text, found = _letter(rng)
            shown.append(f"Letter: {text}\nJSON: {json.dumps(found)}\n\n")
        text, _ = _letter(rng)
        params = _greedy(grammar=JsonSchema(SCHEMA))
        yield Task("".join(shown) + f"Letter: {text}\nJSON: ", params)


def fields() -> Iterator[Task]:
    """The same without an example: the schema alone says how it looks."""
    yield from extractions(0)


# ---- agents ----------------------------------------------------------------------------------------


def _turns(number: int) -> list[str]:
    """An agent reads a file, changes it, sees a test fail and writes it again."""
    name, code, old, new = _code(number)
    path, changed = f"src/{name.strip('_')}.py", _renamed(code, old, new)
    return [
        f"## user\nIn {path}, call `{old}` `{new}`, and run the tests.\n",
        f"## agent\nI read the file first.\n<call>read_file {path}</call>\n",
        f"## tool\n{code}\n",
        f"## agent\nI write the file with the name changed.\n<call>write_file {path}\n{changed}\n</call>\n",
        f"## tool\n{len(changed)} bytes written to {path}.\n",
        f"## agent\n<call>run pytest tests/test_{name.strip('_')}.py</call>\n",
        f"## tool\n1 failed: {path} does not end with a comment that names its author.\n",
        "## agent\nThe file needs a comment at its end. I write it again.\n"
        f"<call>write_file {path}\n{changed}\n# author: agent\n</call>\n",
    ]


def agents() -> Iterator[Task]:
    """The last turn of such a conversation, after another one."""
    example = "".join(_turns(3))
    for number in (1, 2, 4, 5, 6, 7, 8, 0, *range(9, MOST + 1)):
        *turns, last = _turns(number)
        opened = last.split("\n", 3)
        yield Task(
            example + "".join(turns) + "\n".join(opened[:3]) + "\n", _greedy(stop=("</call>",))
        )


# ---- free prose ------------------------------------------------------------------------------------

_STORIES = (
    "The lighthouse keeper had not spoken to anyone for a year when",
    "What makes a city pleasant to walk in is not its monuments. It is",
    "My grandmother taught me to bake bread the slow way. First",
    "Dear Anna, you asked why I left the orchestra. The truth is that",
    "The history of the umbrella is longer than one would think. In",
    "If I could give one piece of advice to a young carpenter, it would be this:",
    "The train stopped between two stations, and nobody knew why.",
    "Most people think that the desert is silent. Those who have slept there know that",
    "Every village has a man who repairs clocks, and in ours he",
    "The first winter on the farm taught us three things. The first was",
    "Nobody remembers who planted the walnut tree behind the school, but",
    "A good map leaves things out. The cartographer must decide",
    "On the morning of the regatta the wind had turned, and my uncle",
    "There is a kind of silence that only libraries have. It",
    "When the river froze, the children of the lower town",
    "I have worked in hotel kitchens for thirty years, and what guests never see is",
    "The violin had been in the family since 1870, though none of us",
    "Coffee came to the port before it came to the capital. Sailors",
    "My neighbour keeps bees on the roof. Every evening in June",
    "It is often said that chess is a game of patience. In truth",
    "The letter was addressed to a street that no longer existed, so the postman",
    "To learn a language late in life is like",
    "The museum closes at six, but the guard always",
    "Long before the bridge was built, people crossed the strait",
)


def prose() -> Iterator[Task]:
    """Free text at temperature 0.8: at 0 models this small repeat themselves, which is copying."""
    for seed, text in enumerate(_STORIES):
        yield Task(text, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=seed))


def some(kind: str, count: int) -> list[Task]:
    return list(islice(WORK[kind](), count))


WORK: dict[str, Callable[[], Iterator[Task]]] = {
    "edit": edits,
    "quotes": quotes,
    "json": extractions,
    "fields": fields,
    "agents": agents,
    "prose": prose,
}
