"""Chat templates in the manner of the families, and conversations that try what they do.

Written for these tests: between them they use every construct that published templates use.
"""

from __future__ import annotations

from typing import Any

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You help.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

THINKING = """{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>' }}{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("There is no first user message.") }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("Only one tool-call at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

INSTRUCTIONS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}{%- set content = message.content.content %}{%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}"""

PARTS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""

MACROS = """{%- macro visible_text(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- macro kind(spec, deep=0) -%}
    {%- if spec.type == 'array' -%}{{ kind(spec['items'], deep + 1) }}[]
    {%- elif spec.type == 'object' -%}
        {{- '{' }}{%- for name, inner in (spec.properties or {}).items() | list %}{{ name }}{{ '?' if name not in (spec.required or []) }}: {{ kind(inner, deep=deep + 1) }}{{ ', ' if not loop.last }}{%- endfor %}{{- '}' }}
    {%- elif spec.enum is defined -%}{{ spec.enum | map('tojson') | join(' | ') }}
    {%- else -%}{{ spec.type | default('any') }}{%- endif -%}
{%- endmacro -%}
{%- set effort = reasoning_effort | default('medium') -%}
<|start|>system<|message|>Today: {{ strftime_now("%Y-%m-%d") }}
Reasoning: {{ effort }}
{% if tools -%}
namespace functions {
{% for tool in tools %}
{% set f = tool.function %}
// {{ f.description | default('none', true) | replace('\\n', ' ') }}
type {{ f.name }} = (_: {{ kind(f.parameters) }}) => any;
{% endfor %}
}
{% endif %}<|end|>
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- if m.thinking and loop.last -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}
        {%- for call in m.tool_calls or [] -%}
            <|start|>assistant to=functions.{{ call.function.name }}<|channel|>commentary json<|message|>{{ call.function.arguments | tojson(separators=(',', ':'), sort_keys=true) }}<|call|>
        {%- else -%}
            <|start|>assistant<|channel|>final<|message|>{%- generation %}{{ visible_text(m.content) }}{%- endgeneration %}{{ '<|return|>' if loop.last else '<|end|>' }}
        {%- endfor -%}
    {%- elif m.role == 'tool' -%}
        {%- set called = namespace(name='?') -%}
        {%- for before in messages -%}
            {%- if before.role != 'assistant' or not before.tool_calls -%}{%- continue -%}{%- endif -%}
            {%- for call in before.tool_calls if call.id == m.tool_call_id -%}{%- set called.name = call.function.name -%}{%- break -%}{%- endfor -%}
        {%- endfor -%}
        <|start|>functions.{{ called.name }} to=assistant<|message|>{{ visible_text(m.content) | tojson }}<|end|>
    {%- else -%}<|start|>{{ m.role }}<|message|>{{ visible_text(m.content) }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

DOCUMENTS = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = 'Knowledge Cutoff: April 2024.' %}{%- set rest = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{- tools | tojson(indent=4) + '\\n' }}{%- endif %}
{%- if documents %}
    {%- for document in documents %}
        {{- 'Document ' + loop.index | string + '\\n' + (document['title'] | default('untitled')) | upper + '\\n' + document['text'] }}
        {%- if not loop.last %}{{- '\\n\\n' }}{%- else %}{{- '<|end_of_text|>\\n' }}{%- endif %}
    {%- endfor %}
{%- endif %}
{% for message in rest %}
    {% if loop.previtem is defined and loop.previtem.role == message.role %}
[again]{% endif %}
    <{{ message.role.title() }}{{ ' ' ~ loop.index ~ '/' ~ loop.length }}>
    {{ message.content | default('', true) | trim | indent(4) }}
    {# a comment #}
    {% set words = (message.content or '').split() %}
    {{ words[:2] | join('+') }}|{{ words | length }}|{{ words | unique | sort | first | default('-') }}|{{ words | last | default('-') }}
    {{- message | items | map('first') | reject('equalto', 'content') | sort | join(',') }}
    {{ "%s has %d" | format(message.role, words | length) }} {{ '{:>4}'.format(loop.index) }}
{% endfor %}
{% if thinking %}{{ '<think>' }}{% endif %}{% raw %}{{ raw }}{% endraw %}
{% filter upper %}ok{% endfilter %}{% set shout %}hey {{ eos_token }}{% endset %}{{ shout }}
{% with x = 1, y = 2.5 %}{{ x + y }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ 'ab' * 3 }} {{ [1, 2] + [3] }} {{ {'a': none} }}{% endwith %}
{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "headers": HEADERS,
    "instructions": INSTRUCTIONS,
    "parts": PARTS,
    "macros": MACROS,
    "documents": DOCUMENTS,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Today's weather.\n<b>Not</b> tomorrow's & 'é' 日本.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
        "return": {"type": "number"},
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


def _call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def _said(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_ASKED = _said("user", "  What <is> 1 & 1?\n\n")
_RESULT = _said("tool", '{"temperature": 22.5}', tool_call_id="call00001", name="get_weather")
_PARTS = [{"type": "text", "text": " a "}, {"type": "text", "text": "b\n"}]

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [_ASKED],
    [_said("system", " Be brief. é 日本 😀 "), _ASKED],
    [
        _said("system", ""),
        _said("user", ""),
        _said("assistant", ""),
        _said("user", "{{ bos_token }}{% x %}"),
    ],
    [_ASKED, _said("assistant", "2\n\n"), _said("user", "Sure?"), _said("assistant", " Yes. ")],
    [_said("user", "a"), _said("user", "b")],
    [_said("assistant", "I begin."), _ASKED],
    [_said("robot", "beep")],
    [_ASKED, _said("assistant", "<think>\nhm\n</think>\n\n2"), _said("user", "Why?")],
    [_ASKED, _said("assistant", "2", reasoning_content="\nAdd them.\n")],
    [
        _ASKED,
        _said("assistant", "2", thinking="Add."),
        _said("user", "x"),
        _said("assistant", "y", reasoning="z"),
    ],
    [
        _said("user", "Weather in Köln?"),
        _said("assistant", None, tool_calls=[_call(1, "get_weather", city="Köln", unit="°C")]),
        _RESULT,
        _said("assistant", "22.5 °C."),
        _said("user", "Thanks"),
    ],
    [
        _said("user", "Both?"),
        _said(
            "assistant",
            "Let me see.",
            tool_calls=[_call(1, "get_weather", city="B"), _call(2, "now")],
            reasoning_content="two",
        ),
        _RESULT,
        _said("tool", "12:00", tool_call_id="call00002"),
    ],
    [
        _said("user", "x"),
        _said("assistant", tool_calls=[_call(1, "now", a=[1, None, {"b": True}], c="\u2028</s>")]),
    ],
    [_said("user", _PARTS)],
    [_said("system", _PARTS[:1]), _said("user", _PARTS), _said("assistant", _PARTS)],
    [
        _said("user", "<|im_end|>\n<|im_start|>system\n<s></s>[INST]"),
        _said("assistant", "\x00\u202e\r\n\t'\"\\"),
    ],
]
