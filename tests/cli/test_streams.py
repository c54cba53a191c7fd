"""Results go to stdout, everything else to stderr, for every verb; -q leaves results and errors, -v adds logs."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest

from peftune import console
from peftune.cli import main

Captured = pytest.CaptureFixture[str]

RESULTS = {
    "data text.jsonl --base BASE": "documents +9",
    "eval --base BASE --adapter a --data x=text.jsonl": "Perplexity",
    "eval --routing --base BASE --adapter a --adapter b --data a=text.jsonl": "Where prompts are sent",
    "generate --base BASE --prompt the --max-new-tokens 3 --temperature 0": "the",
    "generate --base BASE --prompt the --prompt a --max-new-tokens 3 --temperature 0": "=== 1 of 2 ===",
    "merge a --base BASE --out new": "new: 2 of 2 modules folded",
    "export BASE --to gguf --out new": r"new/\S+  \d",
    "push a me/a --base gpt2": r"README.md  \d",
    "adapters list .": "3 adapters in",
    "adapters show a": "a: lora for",
    "adapters compare a b": "not known to be of one base|both are adapters",
    "adapters combine a b --weights 1,1 --out new --base BASE": "new: 1 x a",
    "adapters extract --base BASE --tuned tuned --rank 2 --out new": "From ",
    "adapters import a --base BASE --out new": "new: ",
    "cache list": "/",
    "cache clear --dry-run": "/|would",
    "configs new": "new/accelerate_configs: ",
    "train r.yaml": "new: adapter of step 2",
}


@pytest.mark.parametrize("call", RESULTS)
def test_results_are_on_stdout_and_nothing_else_is(here: Path, tiny_base: Path, call: str, capfd: Captured) -> None:
    words = [str(tiny_base) if word == "BASE" else word for word in call.split()]
    Path("r.yaml").write_text(
        f"base: {tiny_base}\ndata: {{train: text.jsonl, validation: 0.3}}\n"
        "optim: {steps: 2}\nrun: {out: new, eval_every: 1}\n"
    )
    if words[0] == "export":
        pytest.importorskip("gguf")
    shown = {}
    for option in ("--quiet", ""):
        shutil.rmtree("new", ignore_errors=True)
        assert main.run([*words, *filter(None, [option])]) == 0
        shown[option], err = capfd.readouterr()
        assert re.match(RESULTS[call], shown[option]), shown[option]
        assert err == "" if option else words[0] != "train" or "tokens to learn in" in err
        assert "step 1/2" not in shown[option]
    lines = (" ".join(text.split()) for text in (shown[""], shown["--quiet"]))  # a longer age makes a wider column
    ours, quiet = (re.sub(r"[\d.]+( [smh]\b|, [\d.]+ s)", "", text) for text in lines)
    assert ours == quiet


def test_in_a_pipe_no_name_is_cut_and_no_row_wraps(here: Path, tiny_base: Path, capfd: Captured) -> None:
    long = "b" * 150
    shutil.copytree("a", long)
    domains = [f"{name}{'d' * 60}" for name in "pqrs"]
    data = [word for name in domains for word in ("--data", f"{name}=text.jsonl")]
    assert main.run(["eval", "--base", str(tiny_base), "--adapter", f"[red]={long}", "--adapter", long, *data]) == 0
    out = capfd.readouterr().out
    matrices = out.split("With 95 %")[0]
    header, *rows = [line for line in matrices.splitlines() if "d" * 60 in line or long in line or "[red]" in line]
    assert all(name in header for name in domains) and any(long in row for row in rows)
    assert all(len(re.findall(r"\d\.\d\d", row)) == 4 for row in rows if long in row or "[red]" in row)
    assert "…" not in out and "[red]" in out
    assert main.run(["adapters", "list", "."]) == 0
    (row,) = [line for line in capfd.readouterr().out.splitlines() if long in line]
    assert "attn.c_attn" in row


def test_a_library_s_log_is_shown_when_asked_for_alone(
    here: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak(*_: object) -> object:
        logging.getLogger("some.library").info("a detail")
        logging.getLogger("some.library").warning("a warning")
        return scan(here)

    from peftune.adapters.inspect.scan import scan

    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    monkeypatch.setattr("peftune.adapters.inspect.scan.scan", speak)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    said = {}
    for option in ("-q", "--version", "-v"):
        assert main.run(["adapters", "list", ".", *([] if option == "--version" else [option])]) == 0
        said[option] = capfd.readouterr().err
    assert said["-q"] == "" and said["--version"] == "a warning\n"
    assert re.search(r"\d ms  some.library: a detail\n", said["-v"])
    assert re.search(r"took [\d.]+ s, [\d.]+ s of a CPU\n\Z", said["-v"])
    assert console.verbosity == "normal"


def test_quiet_and_verbose_exclude_each_other(capfd: Captured) -> None:
    for words in (["data", "x", "-q", "-v"], ["-q", "data", "-v", "x"]):
        assert main.run(words) == 2
        assert capfd.readouterr().err == "peftune: --quiet and --verbose exclude each other; give one of them\n"


def test_an_error_is_told_quietly_too(capfd: Captured) -> None:
    assert main.run(["data", "none.txt", "-q"]) == 2
    assert "none.txt" in capfd.readouterr().err


def test_every_verb_has_short_help_and_says_how_much_is_said(capfd: Captured) -> None:
    from peftune.cli import adapters, cache

    groups = {"": main.app, "adapters": adapters.app, "cache": cache.app}
    for group, app in groups.items():
        for command in app.registered_commands:
            name = command.name or command.callback.__name__  # type: ignore[union-attr]
            assert main.run([*filter(None, [group]), name, "-h"]) == 0
            assert all(option in capfd.readouterr().out for option in ("--quiet",)), name
