"""deploy/: what the dashboard asks for is what a server tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elinvar.base.config import EngineConfig
from serving import serving

DEPLOY = Path(__file__).parents[1] / "deploy"
_METRIC = re.compile(r"\b((?:elinvar_|vllm:)\w+)(?:\{([^}]*)\})?")
_LABELS = re.compile(r"by \(([^)]*)\)")


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/elinvar.json").read_text())
    (model,) = (v for v in dashboard["templating"]["list"] if v["name"] == "model")
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    return [*found, model["definition"]]


@pytest.fixture(scope="module")
def told(tiny_gguf: Path) -> dict[str, set[str]]:
    """The labels of each sample that a server tells."""
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    config = EngineConfig(kv_memory=16 * 2**20, num_threads=1)
    with serving(tiny_gguf, "tiny", config) as server:
        assert server.post("/v1/completions", body).is_success
        families = text_string_to_metric_families(server.get_metrics())
        samples = [sample for family in families for sample in family.samples]
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    # It shows none before the first preemption.
    found.setdefault("elinvar_preemptions_total", {"model_name", "cause"})
    return found


def test_the_dashboard_asks_for_what_is_there(told: dict[str, set[str]]) -> None:
    assert len(expressions()) > 40
    for text in expressions():
        asked = _METRIC.findall(text)
        assert asked, text
        by = {name.strip() for names in _LABELS.findall(text) for name in names.split(",")}
        for name, selector in asked:
            assert name in told, text
            wanted = by | {pair.partition("=")[0].rstrip("=~!") for pair in _pairs(selector)}
            assert wanted <= told[name], text


def _pairs(selector: str) -> list[str]:
    return [pair for pair in selector.split(",") if pair]


def test_panels_have_places_of_their_own() -> None:
    dashboard = json.loads((DEPLOY / "grafana/elinvar.json").read_text())
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken
        taken |= cells
