"""Chat at the terminal: prompts, commands, conversations, and what a person gets wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftune.cli.writing import repl
from peftune.data.sources.chat_template import STOPS, render_chat
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.settings import GenerationSettings

GREEDY = GenerationSettings(max_new_tokens=6, temperature=0)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that `input` gives; then the end of the file. "^C" is Ctrl-C."""
    lines: list[str] = []

    def read(_: str = "") -> str:
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    return lines


def test_prompts_are_continued_by_whatever_is_in_use(
    bank: AdapterBank, typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["the cat", "/use base", "the cat", "^C", "/set max_new_tokens 2", "a", "/quit", "never"]
    repl.ReplSession(bank, "wide", GREEDY).run()
    expected = ["the cat" + bank.generate(["the cat"], GREEDY, name)[0].text for name in ("wide", None)] + [
        "a" + bank.generate(["a"], dataclasses.replace(GREEDY, max_new_tokens=2), None)[0].text
    ]
    shown = capsys.readouterr().out
    for text in expected:
        assert text in shown
        shown = shown.split(text, 1)[1]
    assert typed == ["never"]


def test_commands_tell_and_change(bank: AdapterBank, capsys: pytest.CaptureFixture[str]) -> None:
    session = repl.ReplSession(bank, None, GREEDY)
    for line in (
        "/use wide",
        "/set temperature 0.7",
        "/set seed 3",
        "/set stop \\n\\n",
        "/adapters",
        "/settings",
        "/help",
    ):
        session.answer(line)
    assert session.settings == dataclasses.replace(GREEDY, temperature=0.7, seed=3, stop=("\n\n",))
    shown = capsys.readouterr().out
    assert "* wide: rank 24" in shown and "  base" in shown and "temperature = 0.7" in shown and "/reset" in shown
    session.answer("/set seed none")
    assert session.settings.seed is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/use poems", "no adapter is called 'poems'"),
        ("/use", "no adapter is called"),
        ("/set warmth 3", "known: max_new_tokens, temperature"),
        ("/set temperature hot", "expected a number"),
        ("/set top_k 1.5", "expected a whole number"),
        ("/set ignore_eos 1", "expected true or false"),
        ("/set logit_bias 5", "cannot be set here"),
        ("/set top_p 3", "top_p is 3.0, expected more than 0"),
        ("/set beams 4", "no beam search"),
        ("/jump", "no such command"),
    ],
)
def test_what_is_not_understood_changes_nothing(bank: AdapterBank, line: str, problem: str) -> None:
    session = repl.ReplSession(bank, "wide", GREEDY)
    with pytest.raises(UserError, match=problem):
        session.answer(line)
    assert (session.name, session.settings) == ("wide", GREEDY)


@pytest.fixture
def chatty(base_directory: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[AdapterBank]:
    directory = tmp_path / "chat"
    shutil.copytree(adapters["wide"], directory)
    (directory / "peftune.json").write_text(json.dumps({"chat": True}))
    bank = AdapterBank(str(base_directory), device="cpu")
    bank.add("chat", directory)
    yield bank


def test_a_conversation_goes_on_by_the_template_of_training(
    chatty: AdapterBank, capsys: pytest.CaptureFixture[str]
) -> None:
    session = repl.ReplSession(chatty, "chat", GREEDY)
    session.answer("the cat")
    session.answer("the dog")
    settings = dataclasses.replace(GREEDY, stop=STOPS)
    messages: list[dict[str, str]] = []
    for said in ("the cat", "the dog"):
        messages.append({"role": "user", "content": said})
        text = chatty.generate([render_chat(messages)], settings, "chat")[0].text.lstrip(" ")
        messages.append({"role": "assistant", "content": text})
        assert text in capsys.readouterr().out or said == "the dog"
    assert session.messages == messages
    session.answer("/reset")
    assert session.messages == []
