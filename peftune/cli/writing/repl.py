"""`peftune generate --interactive`: a prompt at a time, adapters and settings changed in between.

What begins with a slash is a command, everything else a prompt; with an adapter that was trained on conversations it is
what the user says, and the conversation goes on.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftune.adapters.base_of import base_of
from peftune.cli.output.text_output import CONTINUATION, PROMPT, TextPrinter, echo
from peftune.cli.writing.generate import choose_adapter
from peftune.data.sources.chat_template import stops_of
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.request import chat_ids
from peftune.inference.settings import GenerationSettings

HELP = """\
text                     continue it (an empty line begins a document); say it to a chat adapter
/use NAME                another adapter; base for none
/adapters                those that are here
/set NAME VALUE          such as /set temperature 0.7, /set stop \\n\\n, /set seed none
/settings                all of them
/reset                   forget the conversation
/help, /quit             Ctrl-C stops a text, Ctrl-D ends"""


def start_repl(
    base: str | None,
    adapters: Mapping[str, Path],
    use: str | None,
    settings: GenerationSettings,
    precision: str,
    device: str = "auto",
) -> None:
    """Read lines from stdin until its end; UserError for a base or an adapter that cannot be used."""
    name = choose_adapter(adapters, use) if use is not None or len(adapters) < 2 else next(iter(adapters))
    bank = AdapterBank(base or base_of(*([adapters[name]] if name else adapters.values())), precision, device)
    for other, directory in adapters.items():
        bank.add(other, directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C ends a text, not the program
    ReplSession(bank, name, settings).run()


class ReplSession:
    """A person at the terminal: the adapter and settings in use, and the conversation so far."""

    def __init__(self, bank: AdapterBank, name: str | None, settings: GenerationSettings) -> None:
        _check(settings)
        self.bank, self.name, self.settings = bank, name, settings
        self.messages: list[dict[str, Any]] = []
        self._asks = sys.stdin.isatty()
        self._printer = TextPrinter()

    def run(self) -> None:
        """Answer line after line."""
        if self._asks:
            import readline  # noqa: F401  # line editing and history for `input`

            print(f"peftune on {self.bank.base.name}; /help tells more")
        while True:
            try:
                line = input(f"{self.name or 'base'}> " if self._asks else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.answer(line)
            except UserError as error:
                echo(str(error), err=True)
            except KeyboardInterrupt:  # enough of this text
                self._printer.end()

    def answer(self, line: str) -> None:
        """Do what one line says; UserError where it says nothing that is known."""
        command, _, rest = line.strip().partition(" ")
        if not line.startswith("/"):
            self._continue(line)
        elif command == "/use":
            name = rest.strip()
            self.name = None if name == "base" else self.bank.get(name).name
            self.messages.clear()
        elif command == "/set":
            self._set(*rest.strip().partition(" ")[::2])
        elif command == "/adapters":
            for adapter in (None, *map(self.bank.get, self.bank.names)):
                facts = f"{adapter.name}: rank {adapter.rank}{', chat' if adapter.chat else ''}" if adapter else "base"
                print("*" if self.name == (adapter and adapter.name) else " ", facts)
        elif command == "/settings":
            print(*(f"{key} = {value!r}" for key, value in dataclasses.asdict(self.settings).items()), sep="\n")
        elif command == "/help":
            print(HELP)
        elif command == "/reset":
            self.messages.clear()
        else:
            raise UserError(f"{command}: no such command; known: /use /adapters /set /settings /reset /help /quit")

    def _continue(self, line: str) -> None:
        chat = self.bank.chat(self.name)
        settings, prompt = self.settings, self.bank.encode(line, self.name)
        if chat:
            self.messages.append({"role": "user", "content": line})
            prompt = chat_ids(self.bank.tokenizer_of(self.name), self.messages, chat, self.bank.parses(self.name))
            settings = dataclasses.replace(settings, stop=(*settings.stop, *stops_of(chat)))
        else:
            self._printer.write(line, PROMPT)
        text = ""

        def show(_: int, part: str) -> None:
            nonlocal text
            part = part.lstrip(" ") if chat and not text else part  # the template's space after the colon
            text += part
            self._printer.write(part, CONTINUATION)

        try:
            self.bank.generate([prompt], settings, self.name, show)
        finally:  # what was said before a Ctrl-C was said
            if chat:
                self.messages.append({"role": "assistant", "content": text})
        self._printer.end()

    def _set(self, key: str, value: str) -> None:
        known = {field.name: field for field in dataclasses.fields(GenerationSettings)}
        if key not in known:
            raise UserError(f"/set {key}: no such setting; known: {', '.join(known)}")
        changed: Any = dataclasses.replace(self.settings, **{key: _value(key, value, str(known[key].type))})
        _check(changed)
        self.settings = changed


def _check(settings: GenerationSettings) -> None:
    if settings.beams > 1:
        raise UserError("beams: there is no beam search while texts are streamed; leave it at 1")
    if settings.num_return_sequences > 1:
        raise UserError("num_return_sequences: a line is answered once; leave it at 1")


def _value(key: str, typed: str, kind: str) -> Any:
    """What was typed, as the setting's type; `none` where that may be."""
    if key == "stop":
        typed = typed.replace("\\n", "\n").replace("\\t", "\t")
        return () if typed in ("", "none") else (typed,)
    if typed == "none" and "None" in kind:
        return None
    if kind == "bool":
        if typed not in ("true", "false"):
            raise UserError(f"/set {key} {typed!r}: expected true or false")
        return typed == "true"
    if kind.startswith("tuple"):
        raise UserError(f"/set {key}: cannot be set here; in Python it can")
    try:
        return float(typed) if "float" in kind else int(typed)
    except ValueError:
        wanted = "a number" if "float" in kind else "a whole number"
        raise UserError(f"/set {key} {typed!r}: expected {wanted}") from None
