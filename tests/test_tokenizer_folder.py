"""The tokenizer of a Hugging Face folder: its files, the names of its tokens, its chat templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.engine.chat import ChatOptions
from elinvar.engine.gguf_vocab import build_backend
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.engine.vocab import (
    CONTROL,
    NORMAL,
)
from test_tokenizer import load, small_byte_level


def write_folder(folder: Path, **files: Any) -> Any:
    from tokenizers import processors

    backend = build_backend(small_byte_level())
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 258)]
    )
    (folder / "tokenizer.json").write_text(backend.to_str())
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return SimpleNamespace(format="safetensors", path=folder, metadata={"eos_token_id": 5})


def test_folder(tmp_path: Path) -> None:
    checkpoint = write_folder(
        tmp_path,
        tokenizer_config__json={
            "bos_token": {"content": "<|end|>"},
            "chat_template": [{"name": "default", "template": "{{ bos_token }}!"}],
        },
        generation_config__json={"eos_token_id": [6, 7], "temperature": 0.1},
    )
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("he") == [258, 256]
    assert tokenizer.encode("he", add_special=False) == [256]
    assert tokenizer.bos_id == 258
    assert tokenizer.eos_ids == {5, 6, 7, 258}
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "<|end|>!"


def test_chat_template_files_of_a_folder(tmp_path: Path) -> None:
    render = functools.partial(
        lambda t: t.chat_template and t.chat_template.render([{"role": "user", "content": "x"}])
    )
    assert load_tokenizer(write_folder(tmp_path)).chat_template is None
    checkpoint = write_folder(tmp_path, chat_template__json={"chat_template": "json"})
    assert render(load_tokenizer(checkpoint)) == "json"
    checkpoint = write_folder(tmp_path, chat_template__jinja="jinja")
    assert render(load_tokenizer(checkpoint)) == "jinja"


def test_templates_with_names(tmp_path: Path) -> None:
    listed = [{"name": n, "template": n} for n in ("default", "tool_use", "rag")]
    checkpoint = write_folder(tmp_path, tokenizer_config__json={"chat_template": listed})
    assert rendered(load_tokenizer(checkpoint)) == ("default", "tool_use")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file {{ tools }}")
    (tmp_path / "chat_template.jinja").write_text("own {{ tools }}")
    assert rendered(load_tokenizer(checkpoint)) == ("own None", "file []")
    metadata = small_byte_level() | {
        "tokenizer.chat_template": "gguf",
        "tokenizer.chat_template.tool_use": "gguf tools",
    }
    assert rendered(load(metadata)) == ("gguf", "gguf tools")
    with pytest.raises(ModelError, match=r"chat_template\.tool_use is of type int, not str"):
        load(metadata | {"tokenizer.chat_template.tool_use": 1})


def rendered(tokenizer: Tokenizer) -> tuple[str, str]:
    """Without and with tools."""
    own, messages = tokenizer.chat_template, [{"role": "user", "content": "x"}]
    assert own is not None
    return own.render(messages), own.render(messages, ChatOptions(tools=[]))


def test_names_of_tokens(tmp_path: Path) -> None:
    """special_tokens_map.json is asked where tokenizer_config.json is silent, and what has a name is
    a control token: here <think> was a token like others."""
    checkpoint = write_folder(
        tmp_path,
        special_tokens_map__json={"bos_token": "<|end|>", "eos_token": {"content": "nothing"}},
        tokenizer_config__json={
            "eos_token": "he",
            "pad_token": "[PAD]",
            "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}",
        },
    )
    tokenizer = load_tokenizer(checkpoint)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (258, 259)
    assert tokenizer.special_ids == {256, 258}
    assert 256 in tokenizer.eos_ids
    assert rendered(tokenizer)[0] == "<|end|>he[PAD]"


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


def test_ends_of_answers(tmp_path: Path) -> None:
    """In harmony <|end|> ends a message, and the answer goes on; elsewhere it ends the answer."""
    metadata = small_byte_level()
    tokens = [*metadata["tokenizer.ggml.tokens"][:258], *HARMONY, "<|endoftext|>"]
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = np.array([NORMAL] * 258 + [CONTROL] * 7, np.int32)
    named = {tokens[i] for i in load(metadata).eos_ids}
    assert named == {"<|return|>", "<|call|>", "<|endoftext|>"}
    assert {
        small_byte_level()["tokenizer.ggml.tokens"][i] for i in load(small_byte_level()).eos_ids
    } == {"<|end|>"}


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    checkpoint: Any = SimpleNamespace(format="safetensors", path=tmp_path, metadata={})
    with pytest.raises(ModelError, match=r"tokenizer\.json was looked for"):
        load_tokenizer(checkpoint)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("value", [5, True, 1.5, ["a"], {"id": 1}, {"content": None}])
def test_a_token_of_a_folder_that_is_no_text_is_named(tmp_path: Path, value: Any) -> None:
    checkpoint = write_folder(tmp_path, tokenizer_config__json={"eos_token": value})
    with pytest.raises(ModelError, match=r"tokenizer_config\.json has a eos_token that is no text"):
        load_tokenizer(checkpoint)


def test_a_folder_with_a_half_character_or_odd_templates_still_loads(tmp_path: Path) -> None:
    settings = {"bos_token": "\ud800", "eos_token": None, "chat_template": [None, {"name": []}]}
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config__json=settings))
    assert tokenizer.chat_template is None


def test_a_chat_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    checkpoint = write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not UTF-8 text"):
        load_tokenizer(checkpoint)
