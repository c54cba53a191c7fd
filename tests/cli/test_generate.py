"""`peftune generate` as a person and a script see it."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.cli.main import run
from peftune.cli.writing.generate import choose_adapter, generate_texts
from peftune.errors import UserError
from peftune.inference.generate import generate_with_transformers
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base

# PEFT asks Transformers under a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0.0)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(
    base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, GPT2LMHeadModel]:
    """An adapter directory that knows its base, and the adapted model itself."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    adapted.save_pretrained(directory)
    (directory / "peftune.json").write_text(json.dumps(Base(base, str(base)).identity()), encoding="utf-8")
    return directory, adapted.eval()


@pytest.fixture(scope="module")
def other_base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    directory = tmp_path_factory.mktemp("other")
    model = GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def expected(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    return generate_with_transformers(model, tokenizer, [prompt], GREEDY)[0].text


def test_one_prompt_prints_itself_and_its_continuation_only(
    base: Path,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate_texts(str(base), {}, None, ["the cat"], None, GREEDY)
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n") == ("the cat" + expected(model, tokenizer, "the cat")).rstrip("\n")
    assert printed.out.endswith("\n")
    assert printed.err == ""


def test_several_prompts_are_told_apart_and_a_json_file_has_them_all(
    base: Path,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = ["the cat", "", *(f"dog {i}" for i in range(9))]
    generate_texts(str(base), {}, None, prompts, None, GREEDY, json_path=tmp_path / "texts.json")
    printed = capsys.readouterr().out
    assert "=== 1 of 11 ===\nthe cat" in printed and "\n\n=== 11 of 11 ===\ndog 8" in printed
    written = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))
    assert (written["base"], written["adapter"]) == (str(base), None)
    assert written["settings"]["temperature"] == 0
    assert [row["prompt"] for row in written["generations"]] == prompts
    assert [row["text"] for row in written["generations"]] == [expected(model, tokenizer, prompt) for prompt in prompts]
    assert set(written["generations"][0]) == {"prompt", "text", "ids", "finish_reason", "prompt_tokens", "seed"}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["texts.json"]


def test_the_only_adapter_is_used_on_the_base_that_it_names(
    trained: tuple[Path, GPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, adapted = trained
    generate_texts(None, {"poems": directory}, None, ["the cat"], None, GREEDY)
    assert expected(adapted, tokenizer, "the cat") in capsys.readouterr().out


def test_use_base_takes_no_adapter(
    trained: tuple[Path, GPT2LMHeadModel],
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, adapted = trained
    assert expected(model, tokenizer, "the cat") != expected(adapted, tokenizer, "the cat")
    generate_texts(None, {"poems": directory}, "base", ["the cat"], None, GREEDY)
    assert expected(model, tokenizer, "the cat") in capsys.readouterr().out


def test_an_adapter_on_another_base_is_refused(trained: tuple[Path, GPT2LMHeadModel], other_base: Path) -> None:
    with pytest.raises(UserError, match="was trained on"):
        generate_texts(str(other_base), {"poems": trained[0]}, None, ["the"], None, GREEDY)


def test_a_name_that_nothing_has_is_refused_with_those_known() -> None:
    adapters = {"poems": Path("p"), "code": Path("c")}
    with pytest.raises(UserError, match="--use poem: no adapter has this name; known: poems, code, base"):
        choose_adapter(adapters, "poem")
    with pytest.raises(UserError, match="2 adapters and no choice; expected --use with one of poems, code, base"):
        choose_adapter(adapters, None)
    with pytest.raises(UserError, match="stands for no adapter"):
        choose_adapter({"base": Path("b")}, None)
    assert choose_adapter(adapters, "code") == "code"
    assert choose_adapter(adapters, "base") is None
    assert choose_adapter({}, None) is None


def test_without_base_and_adapter_nothing_is_guessed() -> None:
    with pytest.raises(UserError, match="no base and no adapter; pass the base"):
        generate_texts(None, {}, None, ["the"], None, GREEDY)


def test_an_unknown_precision_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="precision is fp8, expected one of fp32, bf16, fp16"):
        generate_texts(str(base), {}, None, ["the"], None, GREEDY, precision="fp8")


def test_half_precision_writes_too(trained: tuple[Path, GPT2LMHeadModel], capsys: pytest.CaptureFixture[str]) -> None:
    generate_texts(None, {"poems": trained[0]}, None, ["the cat"], None, GREEDY, precision="bf16")
    assert capsys.readouterr().out.startswith("the cat")


def test_on_a_terminal_the_prompt_is_dim_and_control_characters_are_harmless(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    generate_texts(str(base), {}, None, ["a\x1b[2J\x9bb"], None, GREEDY)
    shown = terminal.getvalue()
    assert shown.startswith("\x1b[2ma\ufffd[2J\ufffdb\x1b[0m\x1b[1m")


def test_a_prompt_longer_than_the_window_is_said_so(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_texts(str(base), {}, None, ["x" * 100], None, GREEDY)
    assert capsys.readouterr().err == "prompt 1: 101 tokens, the model has 64 positions: it reads the last 48\n"


@contextmanager
def closed_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """stdout is a pipe that nobody reads (set within the test: pytest sets its own stdout between fixture and test)."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, writer)
        os.close(nowhere)


def test_a_closed_pipe_ends_the_work(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = GenerationSettings(max_new_tokens=10**9, temperature=1.0)
    with closed_pipe(monkeypatch):
        generate_texts(str(base), {}, None, ["the"], None, endless)


def test_a_closed_pipe_does_not_keep_the_json_from_being_written(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with closed_pipe(monkeypatch):
        generate_texts(str(base), {}, None, ["the", "cat"], None, GREEDY, json_path=tmp_path / "texts.json")
    assert len(json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))["generations"]) == 2


def test_a_stdout_that_cannot_show_a_character_shows_a_question_mark(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    generate_texts(str(base), {}, None, ["東京"], None, GREEDY)
    assert raw.getvalue().startswith(b"??")


@pytest.mark.parametrize("name", ["absent/texts.json", "."])
def test_a_json_path_that_cannot_be_written_is_refused_before_the_work(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(["generate", "--base", str(base), "--prompt", "the", "--json", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert "cannot be written" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--beams", "2", "--max-new-tokens", "999"], "no sliding window"),
        (["--stop-token-id", "99999"], "stop_token_ids: token id 99999"),
        (["--length-penalty", "0.8"], "only beam search"),
        (["--beams", "2", "--num-return-sequences", "3"], "with beams 2"),
        (["--beams", "2", "--temperature", "0.5"], "does not sample"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_printed(
    base: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert run(["generate", "--base", str(base), "--prompt", "the cat", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err


def test_several_texts_for_a_prompt_are_counted_in_the_headings(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["--beams", "4", "--num-return-sequences", "2", "--length-penalty", "0.8", "--no-repeat-ngram-size", "3"]
    values += ["--max-new-tokens", "4", "--json", str(tmp_path / "texts.json")]
    assert run(["generate", "--base", str(base), "--prompt", "the", "--prompt", "a cat", *values]) == 0
    found = json.loads((tmp_path / "texts.json").read_text())
    assert [one["prompt"] for one in found["generations"]] == ["the", "the", "a cat", "a cat"]
    assert (found["settings"]["length_penalty"], found["settings"]["no_repeat_ngram_size"]) == (0.8, 3)
    out = capsys.readouterr().out
    headings = [line for line in out.splitlines() if line.startswith("=== ")]
    assert headings == [f"=== {p} of 2, text {t} of 2 ===" for p in (1, 2) for t in (1, 2)]
    assert all(one["prompt"] + one["text"] in out for one in found["generations"])
