"""The command line: what it understands, and how it refuses; the verbs' work is tested in their rooms."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peftune
from peftune.cli import main, options
from peftune.errors import CheckFailed, Interrupted, PeftuneError

VERBS = ["quickstart", "data", "train", "eval", "merge", "generate", "serve", "doctor"]
Captured = pytest.CaptureFixture[str]


def peftune_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m peftune …` as a person starts it."""
    command = [sys.executable, "-m", "peftune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False)


def refused(capsys: Captured, *arguments: str) -> str:
    """The single line on stderr of a call that ends with exit code 2 and writes nothing to stdout."""
    assert main.run(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("peftune: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_the_module_and_its_help_work_as_a_process() -> None:
    answer = peftune_process("--help")
    assert answer.returncode == 0
    assert all(verb in answer.stdout for verb in VERBS)
    assert answer.stderr == ""


def test_a_process_refuses_bad_input_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    answer = peftune_process("train", str(tmp_path / "none.yaml"))
    assert answer.returncode == 2
    assert answer.stderr == f"peftune: {tmp_path / 'none.yaml'}: cannot read the recipe: No such file or directory\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_that_begins_with_it(verb: str, capsys: Captured) -> None:
    assert main.run([verb, "--help"]) == 0
    assert f"Example:  peftune {verb} " in capsys.readouterr().out


def test_without_a_verb_it_shows_its_help(capsys: Captured) -> None:
    assert main.run([]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_it_knows_its_version(capsys: Captured) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"peftune {peftune.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evl"], "Did you mean 'eval'? See: peftune --help"),
        (["train"], "RECIPE"),
        (["train", "--fast"], "No such option: --fast See: peftune train --help"),
        (["eval"], "--data"),
        (["eval", "--data", "a=a.txt", "--batch", "0"], "--batch"),
        (["eval", "--data", "a=a.txt", "--batch", "many"], "--batch"),
        (["eval", "--data", "a=a.txt", "--precision", "fp8"], "--precision"),
        (["eval", "--data", "=a.txt"], "--data '=a.txt': expected a name, = and a value, such as poems=held.txt"),
        (["eval", "--data", "a="], "expected a name, = and a value"),
        (["eval", "--data", "a=x.txt", "--data", "a=y.txt"], "--data: a is given twice, x.txt and y.txt"),
        (["eval", "--data", "x/a.txt", "--data", "y/a.txt"], "--data: a is given twice, x/a.txt and y/a.txt"),
        (["eval", "--data", "a=x", "--adapter", "b=1", "--adapter", "b=2"], "--adapter: b is given twice, 1 and 2"),
        (["eval", "--data", "a=x", "--column", "prompt"], "--column 'prompt': expected a name, = and a value"),
        (["eval", "--data", "a=x", "--column", "prmpt=q"], "expected one of text, prompt, completion, messages"),
        (["merge", "adapters/a"], "--out"),
        (["merge", "adapters/a", "--out", "m", "--dtype", "int8"], "--dtype"),
        (["generate", "--temperature", "hot"], "--temperature"),
        (["data"], "SOURCES"),
        (["serve"], "--base"),
        (["serve", "--base", "x", "--port", "-1", "--slots", "0", "--drain", "inf"], "port: expected"),
        (["serve", "--base", "x", "--port", "-1", "--slots", "0", "--drain", "inf"], "slots: expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_call_that_makes_no_sense_is_refused_in_one_line(
    arguments: list[str], expected: str, capsys: Captured
) -> None:
    assert expected.lower() in refused(capsys, *arguments).lower()


def test_a_broken_recipe_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: Captured) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: gpt2\ndata: {train: a.txt}\nrun: {out: b}\nlr: 3\n")
    line = refused(capsys, "train", str(recipe), "lora.rank=0")
    assert "unknown key lr, did you mean optim.lr?" in line
    assert "lora.rank" in line


def test_files_that_are_not_there_are_refused(tiny_base: Path, tmp_path: Path, capsys: Captured) -> None:
    missing, base = str(tmp_path / "none.txt"), str(tiny_base)
    assert missing in refused(capsys, "data", missing, "--base", base)
    assert missing in refused(capsys, "eval", "--base", base, "--data", f"a={missing}")
    assert missing in refused(capsys, "merge", missing, "--out", str(tmp_path / "merged"), "--base", base)
    assert missing in refused(capsys, "generate", "--base", base, "--prompts", missing)
    assert missing in refused(capsys, "generate", "--base", missing, "--prompt", "a")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("can't start new thread"), "no more threads"),
        (OSError(errno.EMFILE, "Too many open files", "a.json"), "a.json: Too many open files"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the output of the tests stays
    assert main.run([]) == 2
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(Interrupted("saved\nstep 3"), 3), (CheckFailed("not\nequal"), 4)])
def test_an_error_is_one_line_with_its_own_exit_code(
    error: PeftuneError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    assert main.run([]) == code
    assert capsys.readouterr().err == f"peftune: {' '.join(str(error).split())}\n"


def test_ctrl_c_where_there_is_nothing_to_save_is_one_line(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peftune.model.base.open_base", interrupt)
    assert main.run(["data", "a.txt", "--base", str(tiny_base)]) == 130
    assert capsys.readouterr().err == "peftune: stopped\n"


def test_a_full_disk_behind_the_output_is_one_line(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    command = [sys.executable, "-m", "peftune", "data", str(tmp_path / "a.txt"), "--base", str(tiny_base)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "peftune: No space left on device; nothing unfinished was kept\n")


def test_what_is_not_raised_on_purpose_is_a_bug_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main.run([])


def test_adapters_and_domains_are_named_or_named_after_their_path() -> None:
    assert options.named("--adapter", ["a=x/y", "adapters/v1.2", "runs/lr=1e-4"]) == {
        "a": "x/y",
        "v1.2": "adapters/v1.2",
        "lr=1e-4": "runs/lr=1e-4",
    }
    assert options.named("--data", ["held/poems.txt", "c=a=b.txt"]) == {"poems": "held/poems.txt", "c": "a=b.txt"}


def test_data_is_described_for_a_base_given_by_its_directory(tiny_base: Path, tmp_path: Path, capsys: Captured) -> None:
    rows, figures = tmp_path / "a.jsonl", tmp_path / "figures.json"
    rows.write_text('{"q": "who", "a": "you"}\n{"q": "what", "a": "that"}\n')
    columns = ["--column", "prompt=q", "--column", "completion=a"]
    assert main.run(["data", str(rows), "--base", str(tiny_base), *columns, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["documents"] == 2
    assert "documents" in capsys.readouterr().out


def test_a_matrix_of_the_base_alone_is_written_as_json(tiny_base: Path, tmp_path: Path) -> None:
    text, figures = tmp_path / "a.txt", tmp_path / "figures.json"
    text.write_text("the cat sat on the mat\n\nthe dog sat on the log\n")
    assert main.run(["eval", "--base", str(tiny_base), "--data", f"a={text}", "--json", str(figures)]) == 0
    read = json.loads(figures.read_text())
    assert read["domains"]["a"]["documents"] == 2
    assert read["rows"]["base"]["a"]["perplexity"] > 1


LIMITED = """
import resource, sys
import transformers, peftune.inference.bank, peftune.inference.perplexity
from peftune.cli import main, options
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
codes = [main.run(call.split()) for call in sys.argv[1:]]
sys.exit(0 if codes == [2] * len(codes) else f"codes {codes}")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how large the process is")
def test_memory_that_runs_out_is_one_line(tiny_base: Path, tmp_path: Path) -> None:
    """Of a base whose positions take 1 GB, and of an adapter with a hole of 1 GB."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}'
    )
    with (tmp_path / "adapter" / "adapter_model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    whole = (base / "model.safetensors").read_bytes()
    begin, rows = 8 + int.from_bytes(whole[:8], "little"), 1 << 23
    header = json.loads(whole[8:begin])
    end, wide = len(whole) - begin, {"dtype": "F32", "shape": [rows, 32]}
    header["unused"] = header.pop("transformer.wpe.weight")
    header["transformer.wpe.weight"] = wide | {"data_offsets": [end, end + rows * 128]}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + whole[begin:])
        file.truncate(8 + len(text) + end + rows * 128)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"n_positions": rows}))
    calls = [f"adapters show {tmp_path}/adapter", f"generate --base {base} --prompt the"]
    answer = subprocess.run([sys.executable, "-c", LIMITED, *calls], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("peftune: ")]
    assert "do not fit into memory" in lines[0] and "out of memory" in lines[1]
    assert len(lines) == 2 and "Traceback" not in answer.stderr
