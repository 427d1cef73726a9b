"""Numbers, settings and bytes of checkpoints may be anything: what is of no use ends in one sentence."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.errors import ElinvarError, ModelError
from elinvar.models.registry import FAMILIES, read_config
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.safetensors import INDEX
from families import CASES
from families.base import SIZES
from hostile_files import LLAMA, SHARDS, Folder, deep


def scale_names(tensors: dict[str, Any]) -> list[str]:
    parts = "scale", "absmax", "SCB"
    return [name for name in tensors if any(p in name for p in parts) and "nested" not in name]


SCHEMES = (
    *("gptq", "gptq-act-order", "gptq-8", "awq", "w4a16", "w4a16-asymmetric", "w8a16", "w8a8"),
    *("w8a8-fp8", "w8a8-fp8-channel", "nvfp4", "nvfp4-modelopt", "fp8-blocks", "mxfp4"),
    *("nf4", "llm-int8", "sparse-fp8", "hqq", "hqq-8", "hqq-axis-0"),
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales(
    scheme: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale that is not finite is found when weights are packed, and its tensor named. Zeros and
    negative ones are numbers like others: no tool writes them, and the weights are what they say."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_schemes

    tensors, quantisation = test_schemes.matrix(scheme)
    names = scale_names(tensors)
    assert names
    for name in names:
        changed = tensors[name].clone()
        if changed.dtype == torch.uint8:  # exponents
            if value <= 0 or np.isinf(value):
                continue
            changed.view(-1)[-1] = 255
        else:
            changed.view(-1)[-1] = value
            if np.isinf(value) and not changed.float().isinf().any():
                continue  # e4m3 has none
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        checkpoint = test_schemes.folder_of(folder, tensors | {name: changed}, quantisation)
        ((matrix, stored),) = checkpoint.tensors.items()
        rules = [test_schemes.Rule("w", matrix, None, stored.shape)]
        for format in ("auto", "f32"):
            if np.isfinite(value) and not (value == 0 and "global" in name):
                load_weights(checkpoint, rules, test_schemes.CONFIG, format)  # type: ignore[arg-type]
                continue
            with pytest.raises(ModelError) as caught:
                load_weights(
                    checkpoint,
                    rules,
                    test_schemes.CONFIG,
                    format,
                    tmp_path / "cache",  # type: ignore[arg-type]
                )
            assert f"Tensor {name} holds scales that are not finite" in str(caught.value)
        assert not list((tmp_path / "cache").glob("packed/*"))


ODD: list[Any] = [
    *(-1, 0, 1, 3, 10**30, 10**400, 1e30, -1e30, 1e-30, float("nan"), float("inf"), True, False),
    *("x", "", "\ud800", None, [], [1], [None], {}, {"a": 1}, {"rope_type": ["yarn"]}),
    *([10**400] * 8, [float("nan")] * 8, json.loads(deep(800))),
]


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_every_family_may_be_anything(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    one = CASES[case]
    settings = deepcopy(SIZES | one.settings)
    if one.around is not None:
        settings = one.around | {"text_config": settings}
    good = getattr(transformers, one.config)(**settings).to_dict()
    good = good["text_config"] if one.around is not None else good
    good = one.published.config(good) if one.published else good
    architecture = one.published.architecture if one.published else one.architecture
    family = next(f for f in FAMILIES if architecture in f.hf_architectures)
    good["architectures"] = [architecture]
    variants = [good | {key: value} for key in good for value in ODD if key != "architectures"]
    for key in ("rope_parameters", "rope_scaling"):
        inner = good.get(key)
        if isinstance(inner, dict):
            variants += [good | {key: inner | {k: value}} for k in inner for value in ODD]
    for config in variants:
        try:
            family.config_from_hf(config)
        except ElinvarError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_setting_and_small_part_of_a_scheme_may_be_anything(
    scheme: str, tmp_path: Path
) -> None:
    """Of its settings, the sizes among its tensors, and JSON inside of one."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_schemes

    tensors, quantisation = test_schemes.matrix(scheme)
    variants = [(tensors, quantisation | {key: v}) for key in quantisation for v in ODD]
    for name, values in tensors.items():
        if values.numel() <= 2 and values.dtype in (torch.int32, torch.int64):
            variants += [
                (tensors | {name: torch.full_like(values, number)}, quantisation)
                for number in (-(2**31), -1, 0, 1, 7, 31, 2**31 - 1)
            ]
        if "quant_state" in name:
            state = json.loads(bytes(values.tolist()))
            for key, value in ((key, value) for key in [*state, "nested_offset"] for value in ODD):
                raw = json.dumps(state | {key: value}).encode()
                said = torch.tensor(list(raw), dtype=torch.uint8)
                variants.append((tensors | {name: said}, quantisation))
    for parts, said in variants:
        try:
            checkpoint = test_schemes.folder_of(tmp_path, parts, said)
            for stored in checkpoint.tensors.values():
                if stored.matrix is not None:
                    rules = [test_schemes.Rule("w", stored.name, None, stored.shape)]
                    load_weights(checkpoint, rules, test_schemes.CONFIG)
        except ModelError as error:
            assert "\n" not in str(error)


def test_truncated_json(tmp_path: Path) -> None:
    path = Folder(tmp_path / "m").write()
    for name in ("config.json", INDEX):
        good = (path / name).read_bytes()
        for size in range(0, len(good), 3):
            (path / name).write_bytes(good[:size])
            with pytest.raises(ModelError, match="is not valid JSON"):
                open_checkpoint(path)
        (path / name).write_bytes(good)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_of_a_folder(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m"
    if not path.exists():
        Folder(path).write()
    name = data.draw(st.sampled_from(["config.json", INDEX, *SHARDS]))
    good = (path / name).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 1500)))
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=3))
    (path / name).write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        config = read_config(checkpoint)
        load_weights(checkpoint, LLAMA.rules(config), config)
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        (path / name).write_bytes(good)
