"""`elinvar generate`: continues one prompt, or all prompts of a file in one continuous batch."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import InputError
from elinvar.base.handling import OFFLINE
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.explain import Records, sentence
from elinvar.cli.grammars import asked_grammar
from elinvar.cli.grammars import grammar as grammar_options
from elinvar.cli.prompts import OrderedLines, Prompt, encode, read_prompts, result, user_message
from elinvar.cli.terminal import Interrupt, bar, note, read_text

if TYPE_CHECKING:
    from elinvar.engine.core import Engine
    from elinvar.engine.llm import LLM


@command
@opt.model
@option("--prompt", "-p", help="The text to continue; - reads it from stdin.")
@option(
    "--prompts-file",
    type=opt.FILE,
    help='JSONL: a line holds a "prompt", "messages" or "prompt_ids", and "id" and sampling parameters as '
    "you like (- reads stdin); the results are JSONL on stdout, in the same order.",
)
@option("--chat", is_flag=True, help="The prompt is a user's message: apply the template.")
@option("--json", "as_json", is_flag=True, help="One JSON object instead of text as it comes.")
@option(
    "--max-tokens", metavar="N", default=opt.DEFAULTS.max_tokens, help="Most tokens to generate."
)
@option(
    "--logprobs",
    type=int,
    metavar="K",
    help="Log-probs of each token and its K likeliest rivals (needs JSON output).",
)
@option(
    "--explain",
    is_flag=True,
    help="Say where the time went: on stderr, and in JSON as `explanation`.",
)
@opt.sampling
@opt.stop
@grammar_options
@opt.memory
@opt.serving
@opt.adapters
@opt.verbose
def generate(
    model: str,
    prompt: str | None,
    prompts_file: Path | None,
    chat: bool,
    as_json: bool,
    explain: bool,
    chat_template: Path | None,
    adapters: list[tuple[str, str]],
    **flags: Any,
) -> int:
    """Continue a prompt, or many at once.

    A single --adapter answers them all; of several, lines of a prompts file name one by "adapter".
    """
    if len(adapters) == 1:
        flags["adapter"] = adapters[0][0]
    elif adapters and prompts_file is None:
        raise click.BadParameter("give one --adapter for one prompt", param_hint="--adapter")
    if (prompt is None) == (prompts_file is None):
        raise click.BadParameter("give either --prompt or --prompts-file")
    if flags["logprobs"] is not None and not as_json and prompts_file is None:
        raise click.BadParameter("--logprobs needs --json, the text alone cannot show them")
    grammar = asked_grammar(*(flags.pop(n) for n in ("schema_file", "regex", "grammar_file")))
    params, config = replace(opt.sampling_params(flags), grammar=grammar), opt.engine_config(flags)
    if prompts_file is not None:
        prompts = read_prompts(prompts_file, params, chat)
    else:
        text = read_text() if prompt == "-" else str(prompt)
        prompts = [Prompt("--prompt", user_message(text) if chat else text, params)]

    from elinvar.cli.load import load

    with load(model, config, chat_template, adapters=adapters) as llm:
        records = Records()
        if explain:
            llm.engine.watchers.append(records)
        if prompts_file is not None:
            return _batch(llm.engine, prompts, records)
        return _single(llm, prompts[0], as_json, records)


def _single(llm: LLM, prompt: Prompt, as_json: bool, records: Records) -> int:
    """Stream one answer to stdout, or print it as JSON; the exit code."""
    from elinvar.engine.output import CompletionBuilder

    ids = encode(llm.engine, prompt)
    builder = CompletionBuilder(ids)
    completion = None
    start = time.perf_counter()
    with Interrupt() as interrupt, closing(llm.stream(ids, prompt.params)) as deltas:
        for delta in deltas:
            completion = builder.push(delta)
            if not as_json:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            if interrupt.hit:
                break
    if not as_json:
        print()
    elif completion is not None:
        values = result(prompt, completion, llm.engine.tokenizer, *records.values())
        print(json.dumps(values, ensure_ascii=False))
    if completion is None:
        return 130
    for one in records.values():
        note(sentence(one))
    if sys.stderr.isatty() and not as_json:
        seconds = time.perf_counter() - start
        count = len(completion.token_ids)
        seed = f", seed {completion.seed}" if prompt.params.temperature else ""
        note(f"{len(ids)} + {count} tokens in {seconds:.2f} s, {completion.finish_reason}{seed}")
    return 0


def _batch(engine: Engine, prompts: list[Prompt], records: Records) -> int:
    """All prompts at once; what is finished is written even if Ctrl-C ends the run."""
    from elinvar.engine.output import CompletionBuilder

    indices: dict[str, int] = {}
    builders: list[CompletionBuilder] = []
    for index, prompt in enumerate(prompts):
        try:
            ids = encode(engine, prompt)
            indices[engine.add(ids, prompt.params, handling=OFFLINE)] = index
        except InputError as error:
            raise InputError(error.field, f"Bad {prompt.where}: {error}") from None
        builders.append(CompletionBuilder(ids))
    lines = OrderedLines(sys.stdout)
    num_done = num_tokens = num_failed = 0
    start = time.perf_counter()
    shown = not sys.stdout.isatty()
    with Interrupt() as interrupt, bar("Generating", len(prompts), shown) as update:
        try:
            while engine.has_work and not interrupt.hit:
                for delta in engine.step():
                    index = indices[delta.request_id]
                    num_tokens += len(delta.token_ids)
                    completion = builders[index].push(delta)
                    if completion is not None:
                        num_done += 1
                        known = records.pop(delta.request_id, None)
                        values = result(prompts[index], completion, engine.tokenizer, known)
                        if delta.error is not None:
                            num_failed += 1
                            values["error"] = delta.error
                        lines.put(index, values)
                rate = num_tokens / (time.perf_counter() - start)
                update(num_done, f"{num_done}/{len(prompts)} · {rate:,.0f} tokens/s")
        finally:
            lines.close()
    seconds = time.perf_counter() - start
    failed = f", {num_failed} of them failed" if num_failed else ""
    note(
        f"{num_done} of {len(prompts)} prompts{failed}, {num_tokens:,} tokens in {seconds:.1f} s, "
        f"{num_tokens / seconds:,.0f} tokens/s"
    )
    return 130 if interrupt.hit else int(num_failed > 0)
