"""How the families write: one description each, from their published chat templates."""

from __future__ import annotations

from elinvar.engine.dialects.words import (
    Calls,
    Channels,
    Family,
    Fields,
    Function,
    Id,
    Json,
    Keywords,
    Name,
    Part,
    Syntax,
    Thoughts,
)

_THINK = Thoughts("<think>", "</think>")
_TAGS = (("<tool_call>", "</tool_call>"),)
_BARE = ("", "")
_FIELDS = Fields("\n<parameter=", ">\n", "\n</parameter>")
_XML = ("\n<function=", Name(), ">", _FIELDS, "\n</function>\n")
_ATTRIBUTES = Fields('\n<parameter name="', '">', "</parameter>")
_DSML_TYPES = (' string="true">', ' string="false">')
_DSML_FIELDS = Fields('\n<｜DSML｜parameter name="', '"', "</｜DSML｜parameter>", _DSML_TYPES)
_DEEPSEEK = (("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),)


def _listed(call: tuple[Part, ...], *frames: tuple[str, str]) -> Calls:
    return Calls(call, frames, "[", "]", ", ")


def _gemma(quote: str) -> tuple[Part, ...]:
    return "call:", Name(), Keywords("{", ":", "}", Syntax(quote))


_FAMILIES = (
    # Where nothing better is known, and what a model is told whose template takes no tools.
    Family(
        "json",
        _listed((Function(),), *_TAGS, ("```json", "```"), _BARE),
        _THINK,
    ),
    # Nous Hermes, Qwen 2.5 and 3, QwQ, Granite 4, EXAONE 4, MiMo, Bielik.
    Family("hermes", Calls(("\n", Function(), "\n"), _TAGS, many=False), _THINK),
    # Qwen3-Coder and 3.5, Nemotron 3, Step 3.5.
    Family("qwen-xml", Calls(_XML, _TAGS, many=False), _THINK),
    Family(
        "seed",
        Calls(
            (
                "\n<function=",
                Name(),
                ">",
                Fields("\n<parameter=", ">", "</parameter>"),
                "\n</function>\n",
            ),
            (("<seed:tool_call>", "</seed:tool_call>"),),
            many=False,
        ),
        Thoughts("<seed:think>", "</seed:think>"),
    ),
    Family(
        "minimax",
        Calls(
            ('\n<invoke name="', Name(), '">', _ATTRIBUTES, "\n</invoke>"),
            (("<minimax:tool_call>", "\n</minimax:tool_call>"),),
        ),
        _THINK,
    ),
    Family(
        "glm-4.5",
        Calls(
            (Name(), Fields("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>")),
            (("<tool_call>", "\n</tool_call>"),),
            many=False,
        ),
        Thoughts("<think>", "</think>", ("<tool_call>",)),
        ends=("<|user|>", "<|observation|>"),
    ),
    Family(
        "glm-4",
        Calls((Name(), "\n", Json()), (_BARE,), many=False),
        _THINK,
        ends=("<|user|>", "<|observation|>"),
    ),
    # Llama 3.1 to 3.3, and 4 by its own template.
    Family(
        "llama",
        Calls(
            (Function("parameters"),),
            (_BARE, ("<|python_tag|>", "")),
            between="; ",
        ),
        drops=("<|python_start|>", "<|python_end|>"),
        ends=("<|eom_id|>", "<|eom|>"),
        single=True,
    ),
    # Llama 3.2 and 4 where they are asked for it, Gemma 3.
    Family(
        "pythonic",
        _listed(
            (Name(), Keywords()),
            _BARE,
            ("<|python_start|>", "<|python_end|>"),
            ("```tool_code", "```"),
            ("```python", "```"),
        ),
        _THINK,
        ends=("<|eom_id|>", "<|eom|>"),
    ),
    Family(
        "lfm2",
        _listed((Name(), Keywords()), ("<|tool_call_start|>", "<|tool_call_end|>")),
        _THINK,
    ),
    # Up to Nemo and Small 3.1.
    Family(
        "mistral",
        _listed((Function(),), ("[TOOL_CALLS]", "")),
        Thoughts("[THINK]", "[/THINK]", ("[TOOL_CALLS]",)),
        ids="nine",
    ),
    Family(
        "mistral-args",
        Calls((Name(), Id("[CALL_ID]"), "[ARGS]", Json()), (("[TOOL_CALLS]", ""),), many=False),
        Thoughts("[THINK]", "[/THINK]", ("[TOOL_CALLS]",)),
        ids="nine",
    ),
    # V3 and R1.
    Family(
        "deepseek-v3",
        Calls(
            (
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                Name(),
                "\n```json\n",
                Json(),
                "\n```<｜tool▁call▁end｜>",
            ),
            _DEEPSEEK,
            between="\n",
        ),
        Thoughts("<think>", "</think>", ("<｜tool▁calls▁begin｜>",)),
        arguments="text",
    ),
    Family(
        "deepseek-v3.1",
        Calls(
            ("<｜tool▁call▁begin｜>", Name(), "<｜tool▁sep｜>", Json(), "<｜tool▁call▁end｜>"),
            _DEEPSEEK,
        ),
        Thoughts("<think>", "</think>", ("<｜tool▁calls▁begin｜>",)),
        arguments="text",
    ),
    Family(
        "deepseek-v3.2",
        Calls(
            ('\n<｜DSML｜invoke name="', Name(), '">', _DSML_FIELDS, "\n</｜DSML｜invoke>"),
            (("<｜DSML｜function_calls>", "\n</｜DSML｜function_calls>"),),
        ),
        _THINK,
    ),
    Family(
        "kimi",
        Calls(
            (
                "<|tool_call_begin|>",
                Name("functions.", numbered=True),
                "<|tool_call_argument_begin|>",
                Json(),
                "<|tool_call_end|>",
            ),
            (("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
        ),
        Thoughts("<think>", "</think>", ("<|tool_calls_section_begin|>",)),
        ids="numbered",
    ),
    # Granite 3; 4 writes as Hermes does.
    Family(
        "granite",
        _listed((Function(),), ("<|tool_call|>", ""), *_TAGS),
        _THINK,
        drops=("<response>", "</response>"),
    ),
    Family(
        "phi",
        _listed((Function(),), ("<|tool_call|>", "<|/tool_call|>"), ("functools", "")),
        _THINK,
    ),
    Family(
        "command",
        _listed((Function("parameters", "tool_name"),), ("<|START_ACTION|>", "<|END_ACTION|>")),
        Thoughts("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_ACTION|>",)),
        drops=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    Family(
        "apertus",
        _listed(('{"', Name(), '": ', Json(), "}"), ("<|tools_prefix|>", "<|tools_suffix|>")),
        Thoughts("<|inner_prefix|>", "<|inner_suffix|>", ("<|tools_prefix|>",)),
        drops=("<|inner_suffix|>",),
    ),
    # Apriel, Jamba.
    Family(
        "apriel",
        _listed((Function(),), ("<tool_calls>", "</tool_calls>")),
        Thoughts("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
        drops=("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    ),
    Family("nemotron", _listed((Function(),), ("<TOOLCALL>", "</TOOLCALL>")), _THINK),
    Family(
        "solar",
        Calls(
            (
                Id("<|tool_call:begin|>", needed=True),
                "<|tool_call:name|>",
                Name(),
                "<|tool_call:args|>",
                Json(),
                "<|tool_call:end|>",
            ),
            (("<|tool_calls|>", "<|calls|>"),),
        ),
        Thoughts("<|think|>", "<|end|>"),
        drops=("<|content|>", "<|begin|>assistant"),
        ends=("<|calls|>", "<|flush|>"),
    ),
    Family(
        "function-gemma",
        Calls(_gemma("<escape>"), (("<start_function_call>", "<end_function_call>"),), many=False),
        _THINK,
        ends=("<start_function_response>",),
    ),
    Family(
        "gemma4",
        Calls(_gemma('<|"|>'), (("<|tool_call>", "<tool_call|>"),), many=False),
        Thoughts("<|channel>thought\n", "<channel|>"),
        ends=("<|tool_response>",),
    ),
    Family("harmony", Channels(), ends=("<|call|>", "<|return|>"), single=True),
)

FAMILIES = {family.name: family for family in _FAMILIES}
