"""How often a draft is accepted when draft and target share their noise, on real distributions.

    python benchmarks/coupling.py TARGET [--drafts MODEL ...] [--exits LAYERS ...] [--save]

At positions of real texts, at temperature 1, target and draft sample through `ops.sample` as serving does:
once with the same seeds, once each with its own. What is counted is held against what the two
distributions p and q say must come, exactly: the bound (1 - TV) / (1 + TV), Gumbel coupling itself, draws
that know nothing of each other (sum of p q), and classical rejection sampling (1 - TV). A draft is another
file with the same tokens, or the target itself as if it ended after some of its layers.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from perplexity import text_of
from sidebyside.results import FOLDER, cpu_name, write

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import BLOCK_SIZE
from elinvar.engine.tokenizer import load_tokenizer
from elinvar.models.family import Model
from elinvar.models.load import load_parts
from elinvar.ops import Ops, load_provider
from elinvar.ops.arguments import SampleArgs
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
CHART = Path(__file__).parents[1] / "docs/coupling.svg"
BINS = 20
OTHER = 10**9
"""What is added to seeds for noise of one's own."""


@dataclass
class Row:
    """Of one position."""

    tv: float
    exact: float
    """Gumbel coupling, from p and q."""
    overlap: float
    """Sum of p q."""
    coupled: float
    """Counted."""
    independent: float
    seeds: int

    @property
    def bound(self) -> float:
        return (1 - self.tv) / (1 + self.tv)

    @property
    def is_near(self) -> bool:
        """Whether what was counted is within three standard errors, and a draw, of what must come."""
        error = (self.exact * (1 - self.exact) / self.seeds) ** 0.5
        return abs(self.coupled - self.exact) <= 3 * error + 1 / self.seeds


def logits_of(model: Any, ops: Ops, ids: Sequence[int], num_layers: int | None = None) -> F32:
    """[T, V] of a text in one forward, through all layers or the first ones."""
    specs = model.kv_specs("f16")
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    caches: dict[int, Any] = {}
    for spec in specs:
        caches |= zip(spec.layers, ops.kv_layers(spec, num_blocks), strict=True)
    positions = np.arange(len(ids), dtype=np.int32)
    batch = ForwardBatch(
        input_ids=np.array(ids, np.int32),
        positions=positions,
        query_start_loc=np.array([0, len(ids)], np.int32),
        seq_lens=np.array([len(ids)], np.int32),
        block_tables=(np.arange(num_blocks, dtype=np.int32)[None],) * len(specs),
        slot_mapping=(positions,) * len(specs),
        logit_rows=positions,
    )
    kv = [caches[i] for i in range(len(caches))]
    if num_layers is None:
        return model.forward(batch, kv).copy()
    return model.logits(model.hidden_early(batch, kv, num_layers)).copy()


def sampled(ops: Ops, logits_TV: F32, seed: int) -> NDArray[np.int32]:
    count = len(logits_TV)
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    return ops.sample(
        logits_TV,
        SampleArgs(
            np.full(count, seed, np.uint64),
            np.arange(1, count + 1, dtype=np.int32),
            ones,
            np.zeros(count, np.int32),
            ones,
            zeros,
            0,
        ),
    ).ids.copy()


def softmax(logits_V: F32) -> F64:
    p = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return p / p.sum()


def coupling(p: F64, q: F64) -> float:
    """Chance that argmax(log p + G) = argmax(log q + G): the sum over x of
    1 / sum over y of max(p_y / p_x, q_y / q_x) (Daliri, Musco and Suresh, 2024)."""
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    order = np.argsort(q / p)  # of those before x, p_y / p_x is the larger one
    p, q = p[order], q[order]
    before, behind = np.cumsum(p), q.sum() - np.cumsum(q)
    return float((1 / (before / p + behind / q)).sum())


def rows_of(ops: Ops, target_TV: F32, draft_TV: F32, seeds: int) -> tuple[list[Row], F64]:
    """And, by tenths of what the draft gives its own token: draws, and those accepted [2, 10]."""
    coupled, independent = np.zeros((2, len(target_TV)))
    by_chance = np.zeros((2, 10))
    pairs = [(softmax(p), softmax(q)) for p, q in zip(target_TV, draft_TV, strict=True)]
    for seed in range(seeds):
        target, draft = sampled(ops, target_TV, seed), sampled(ops, draft_TV, seed)
        right = target == draft
        coupled += right
        independent += target == sampled(ops, draft_TV, seed + OTHER)
        chances = [q[token] for (_, q), token in zip(pairs, draft, strict=True)]
        tenth = np.minimum((10 * np.array(chances)).astype(int), 9)
        np.add.at(by_chance[0], tenth, 1)
        np.add.at(by_chance[1], tenth, right)
    rows = [
        Row(
            tv=float(np.abs(p - q).sum() / 2),
            exact=coupling(p, q),
            overlap=float(p @ q),
            coupled=c / seeds,
            independent=i / seeds,
            seeds=seeds,
        )
        for (p, q), c, i in zip(pairs, coupled, independent, strict=True)
    ]
    return rows, by_chance


def summary(rows: Sequence[Row]) -> dict[str, float]:
    def mean(of: Callable[[Row], float]) -> float:
        return round(float(np.mean([of(row) for row in rows])), 4)

    bound, coupled = mean(lambda r: r.bound), mean(lambda r: r.coupled)
    return {
        "positions": len(rows),
        "tv": mean(lambda r: r.tv),
        "coupled": coupled,
        "coupled, exact": mean(lambda r: r.exact),
        "bound": bound,
        "coupled over bound": round(coupled / bound, 4),
        "independent": mean(lambda r: r.independent),
        "independent, exact": mean(lambda r: r.overlap),
        "rejection": mean(lambda r: 1 - r.tv),
        "within 3 errors of exact": mean(lambda r: r.is_near),
        "least exact over bound": round(min(r.exact / max(r.bound, 1e-9) for r in rows), 4),
    }


def by_tv(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Means over positions of like TV."""
    found = []
    for at in range(BINS):
        some = [row for row in rows if at == min(int(BINS * row.tv), BINS - 1)]
        if some:
            found.append(summary(some))
    return found


# ---- the chart --------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP = 640, 380, 56, 30
COLOURS = {"coupled": "#1f6fb4", "independent": "#c8501e"}


def _at(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * (WIDTH - LEFT - 20), TOP + (1 - y) * (HEIGHT - TOP - 50)


def _curve(of: Callable[[float], float], label: str, at: float, dy: int, dash: str) -> str:
    """dy: how far below the curve, where TV is `at`, the label is."""
    points = " ".join("{:.1f},{:.1f}".format(*_at(i / 50, of(i / 50))) for i in range(51))
    x, y = _at(at, of(at))
    anchor = "start" if dy < 0 else "end"
    return (
        f'<polyline points="{points}" fill="none" stroke="#777" stroke-dasharray="{dash}"/>'
        f'<text x="{x:.0f}" y="{y + dy:.0f}" fill="#777" text-anchor="{anchor}">{label}</text>'
    )


def chart(found: dict[str, list[dict[str, float]]], title: str) -> str:
    """A dot for the positions of a draft whose TV is alike; its area tells how many they are."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{title}</text>',
    ]
    for i in range(6):
        (x, bottom), (left, y) = _at(i / 5, 0), _at(0, i / 5)
        right, top = _at(1, 1)
        parts.append(
            f'<path d="M{left} {y:.0f}H{right}M{x:.0f} {bottom}V{top}" stroke="#eee"/>'
            f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{i / 5:.1f}</text>'
            f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{i / 5:.1f}</text>'
        )
    x, y = _at(0.5, 0)
    parts.append(
        f'<text x="{x}" y="{y + 36}" text-anchor="middle">total variation TV of target and draft</text>'
    )
    parts.append(_curve(lambda tv: 1 - tv, "rejection sampling, 1 - TV", 0.3, -8, "none"))
    parts.append(_curve(lambda tv: (1 - tv) / (1 + tv), "bound", 0.3, 14, "4 3"))
    for bins in found.values():
        for one in bins:
            for kind, colour in COLOURS.items():
                x, y = _at(one["tv"], one[kind])
                radius = 1.5 + 0.12 * one["positions"] ** 0.5 * 2
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" '
                    'fill-opacity="0.6"/>'
                )
    for i, (kind, colour) in enumerate(COLOURS.items()):
        y = TOP + 16 + 18 * i
        label = {"coupled": "shared noise, counted", "independent": "noise of its own, counted"}
        parts.append(f'<circle cx="{WIDTH - 190}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - 178}" y="{y}">{label[kind]}</text>')
    return "\n".join([*parts, "</svg>\n"])


# ---- the run ----------------------------------------------------------------------------------


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target")
    parser.add_argument("--drafts", nargs="*", default=[], help="models with the same tokens")
    parser.add_argument("--exits", nargs="*", type=int, default=[], help="layers of the target")
    parser.add_argument("--text", nargs="+", default=["prose", "python"])
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", action="store_true", help="figures and chart, in the repository")
    options = parser.parse_args()

    ops = load_provider("cpu", options.threads)
    checkpoint = open_checkpoint(Path(options.target))
    tokenizer = load_tokenizer(checkpoint, cache_root())
    target = load_parts(checkpoint, "auto", cache_root()).build(ops)
    texts = {name: text_of(name) for name in options.text}
    ids = {name: tokenizer.encode(text)[: options.tokens] for name, text in texts.items()}
    target_TV = np.concatenate([logits_of(target, ops, one) for one in ids.values()])
    models: dict[str, tuple[Model, int | None]] = {}
    for path in map(Path, options.drafts):
        parts = load_parts(open_checkpoint(path), "auto", cache_root())
        models[path.stem] = parts.build(ops), None
    for layers in options.exits:
        models[f"the first {layers} of {target.config.num_layers} layers"] = target, layers
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "target": Path(options.target).name,
        "seeds": options.seeds,
        "versions": {"python": platform.python_version()},
        "texts": {
            name: {"sha256": sha256(text.encode()).hexdigest(), "tokens": len(ids[name])}
            for name, text in texts.items()
        },
        "drafts": {},
    }
    found = {}
    for name, (model, layers) in models.items():
        draft_TV = np.concatenate([logits_of(model, ops, one, layers) for one in ids.values()])
        rows, by_chance = rows_of(ops, target_TV, draft_TV, options.seeds)
        found[name] = by_tv(rows)
        accepted = np.round(by_chance[1] / np.maximum(by_chance[0], 1), 3).tolist()
        report["drafts"][name] = {
            **summary(rows),
            "by tv": found[name],
            "accepted by tenths of the draft's own probability": accepted,
        }
        print(name)
        for key, value in summary(rows).items():
            print(f"  {key:24} {value:.4g}")
        print(f"  by tenths of q           {accepted}", flush=True)
    if options.save:
        stem = f"{report['date'][:10]}-{Path(options.target).stem.lower()}"
        print(write(report, FOLDER / "coupling" / f"{stem}.json"))
        title = f"Drafts accepted at temperature 1 ({Path(options.target).stem})"
        CHART.write_text(chart(found, title))


if __name__ == "__main__":
    main()
