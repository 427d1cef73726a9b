"""Pickles, which are never opened, and hubs that answer nonsense."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import ModelError
from elinvar.weights import sources
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.safetensors import SINGLE
from hostile_files import CONFIG, deep
from test_sources import Hub, cache, hub  # noqa: F401 (fixtures)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "it's.pt"])
def test_the_command_that_converts_a_pickle_works(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "a model [1]"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    w = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    torch.save({"w": w.T, "tied": w}, folder / name)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder if name == "pytorch_model.bin" else folder / name)
    assert f"{name} is a pickle, which can run code when opened; python3 -c " in str(caught.value)
    message = str(caught.value)
    command = shlex.split(message[message.index("python3") : message.index(" makes ")])
    subprocess.run([sys.executable, *command[1:]], check=True)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"w", "tied"}
    assert checkpoint.tensors["w"].data.tobytes() == w.T.contiguous().numpy().tobytes()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_no_pickle_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("pytorch_model.bin", "x.pkl", "model.pt", "x.pth", "x.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(ModelError, match="is a pickle"):
                open_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf", "..\\evil.gguf"]
)
def test_names_in_a_hub_s_list_stay_in_the_folder(
    name: str,
    hub: type[Hub],  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    hub.files = {name: b"GGUF" + bytes(99)}
    answer = hub.file
    hub.file = lambda self, asked: answer(self, name)  # type: ignore[method-assign,assignment]
    try:
        path = sources.pull("hf:org/name")
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert path.resolve().is_relative_to(cache.resolve())
    assert not Path("/tmp/evil.gguf").exists() and not list(cache.parent.glob("evil*"))


@pytest.mark.parametrize(
    "listing",
    [
        b"[" * 99_999,
        b'{"sha": "c", "siblings": ' + deep(50_000) + b"}",
        b'{"sha": "c", "siblings": [{"rfilename": "a\\u0000.safetensors", "size": 1, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "\\ud800.safetensors", "size": 1, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "m.gguf", "size": Infinity, "blobId": ""}]}',
        b'{"sha": "c", "siblings": [{"rfilename": "m.gguf", "size": "NaN", "blobId": ""}]}',
    ],
)
def test_a_hub_that_answers_nonsense(
    listing: bytes,
    hub: type[Hub],  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    hub.info = lambda self: self.answer(listing)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="does not answer like a Hugging Face hub"):
        sources.pull("hf:org/name")
    assert not list(cache.glob("models/*"))
