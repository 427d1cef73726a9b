"""`elinvar chat`: a conversation at the terminal, or line by line through a pipe."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError
from elinvar.base.sampling import SamplingParams
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.explain import Records, sentence
from elinvar.cli.terminal import Interrupt, fail, note, styled

if TYPE_CHECKING:
    from elinvar.engine.chat import ChatOptions
    from elinvar.engine.llm import LLM

HELP = """\
/system TEXT  set the system message (no TEXT: remove it)
/reset        forget the conversation, keep the system message
/adapter NAME answer with a loaded LoRA adapter (no NAME: with the model alone)
/save FILE    write the conversation as JSON
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


@command
@opt.model
@option("--system", metavar="TEXT", help="System message.")
@option("--max-tokens", metavar="N", default=1024, help="Most tokens in an answer.")
@option(
    "--thinking/--no-thinking",
    default=None,
    help="Think before the answer or not, with models that can do both.",
)
@option("--explain", is_flag=True, help="Say after each answer where its time went.")
@opt.sampling
@opt.memory
@opt.serving
@opt.adapters
@opt.verbose
def chat(
    model: str,
    system: str | None,
    thinking: bool | None,
    explain: bool,
    chat_template: Path | None,
    adapters: list[tuple[str, str]],
    **flags: Any,
) -> None:
    """Talk with a model, or with the first --adapter of it."""
    if adapters:
        flags["adapter"] = adapters[0][0]
    params, config = opt.sampling_params(flags), opt.engine_config(flags)

    from elinvar.cli.load import load
    from elinvar.engine.chat import ChatOptions

    with load(model, config, chat_template, adapters=adapters) as llm:
        conversation = Conversation(llm, params, system, ChatOptions(thinking=thinking))
        conversation.check()
        if explain:
            llm.engine.watchers.append(conversation.records)
        if sys.stdin.isatty():
            _prepare_terminal()
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        while (line := _read_line()) is not None:
            if line.startswith("/"):
                if not conversation.command(line):
                    break
            elif line:
                conversation.answer(line)


class Conversation:
    """The messages so far and what the person does with them."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, options: ChatOptions
    ) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.options = options
        self.records = Records()
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def check(self) -> None:
        """Raises ModelError where the model cannot chat, InputError where it has no switch for
        thinking, or cannot do what the parameters ask, before the person has typed anything."""
        hello = [{"role": "user", "content": "Hello"}]
        self.llm.engine.check(self.llm.engine.encode_chat(hello, self.options), self.params)

    def answer(self, text: str) -> None:
        """Stream the answer to `text`. Ctrl-C ends it; what was said stays in the conversation."""
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        with Interrupt() as interrupt:
            try:
                answer = self.llm.stream_chat(self.messages, self.params, self.options)
                with closing(answer) as deltas:
                    for delta in deltas:
                        said.append(delta.text)
                        sys.stdout.write(delta.text)
                        sys.stdout.flush()
                        if interrupt.hit:
                            break
            except InputError as error:
                self.turns.pop()
                fail(f"{error} /reset begins a new conversation.")
                return
        self.turns.append({"role": "assistant", "content": "".join(said)})
        print(styled(" [stopped]", "2", sys.stdout) if interrupt.hit else "", flush=True)
        for one in self.records.values():
            note(sentence(one))
        self.records.clear()

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False: leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.turns.clear()
            note("A new conversation.")
        elif name == "/system":
            self.system = rest or None
            note("System message set." if rest else "System message removed.")
        elif name == "/adapter":
            self._choose(rest or None)
        elif name == "/save":
            self._save(rest)
        else:
            fail(f"{name} is not a command; /help lists them.")
        return True

    def _choose(self, adapter: str | None) -> None:
        if adapter is not None:
            try:
                self.llm.engine.adapters.find(adapter)
            except InputError as error:
                fail(str(error))
                return
        self.params = replace(self.params, adapter=adapter)
        note(f"{adapter} answers." if adapter else "The model itself answers.")

    def _save(self, name: str) -> None:
        if not name:
            fail("/save needs a file name.")
            return
        try:
            text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"{name} cannot be written: {error.strerror}.")
        else:
            note(f"Saved {len(self.messages)} messages to {name}.")


def _prepare_terminal() -> None:
    import importlib

    # Its import gives input() line editing and history; builds of Python without it have neither.
    try:
        importlib.import_module("readline")
    except ImportError:
        note("This Python has no readline: lines cannot be edited.")


def _read_line() -> str | None:
    """The next line without its ends; None at the end of input. Ctrl-C drops what was typed."""
    while True:
        try:
            if sys.stdin.isatty():
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /quit leaves.")
        except UnicodeDecodeError as error:
            raise InputError("stdin", f"stdin is not UTF-8 text: {error.reason}.") from None
        except EOFError:
            print()
            return None
