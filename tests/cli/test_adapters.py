"""`peftune adapters` as a person meets it: help, tables, JSON, refusals in one line; other tests do the sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

Captured = pytest.CaptureFixture[str]
VERBS = ["list", "show", "combine", "extract", "import", "compare"]


@pytest.fixture
def here(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with adapters `a` (trained, as peftune.json says) and `b` (plain PEFT)."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        config = LoraConfig(
            r=2 + number, lora_alpha=4, target_modules=["attn.c_attn", "attn.c_proj"], fan_in_fan_out=True
        )
        with quiet_peft():
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / name)
    recipe = {"data": {"train": [{"path": "poems.txt"}]}, "lora": {"variant": "lora"}, "quantize": None}
    metrics = {"[bold]held": {"base": {"loss": 5.0, "perplexity": 148.4}, "adapter": {"loss": 4.0, "perplexity": 54.6}}}
    recorded = {
        **Base(tiny_base, str(tiny_base)).identity(), "peftune": "0.1.0", "recipe": recipe, "step": 30, "tokens": 12345,
        "seconds": 6.5, "precision": "fp32", "metrics": metrics, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (tmp_path / "a" / "peftune.json").write_text(json.dumps(recorded))
    return tmp_path


def printed(capsys: Captured, *arguments: str) -> str:
    capsys.readouterr()
    assert main.run(["adapters", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: Captured, *arguments: str) -> str:
    capsys.readouterr()
    assert main.run(["adapters", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("peftune: ") and err.count("\n") == 1
    return err


def test_each_verb_has_help_with_an_example(capsys: Captured) -> None:
    assert all(verb in printed(capsys) for verb in VERBS)
    for verb in VERBS:
        assert f"Example:  peftune adapters {verb} " in printed(capsys, verb, "--help")


def test_what_makes_no_sense_points_to_the_help_of_the_verb(capsys: Captured) -> None:
    assert "No such command 'shw'" in refused(capsys, "shw") and "peftune adapters --help" in refused(capsys, "shw")
    assert "See: peftune adapters combine --help" in refused(capsys, "combine", "a", "--out", "c")
    assert "'0.5,x': expected numbers" in refused(capsys, "combine", "a", "--weights", "0.5,x", "--out", "c")
    assert "See: peftune adapters extract --help" in refused(capsys, "extract", "--rank", "0")


def test_list_shows_what_is_there_and_what_is_broken(here: Path, capsys: Captured) -> None:
    (here / "c").mkdir()
    (here / "c" / "adapter_config.json").write_text("{")
    out = printed(capsys, "list", ".", "--json", "list.json")
    assert "2 adapters in ." in out and "attention" in out and "[bold]held 4.000" in out
    assert "  c: adapter_config.json: cannot be read" in out
    rows = json.loads((here / "list.json").read_text())["adapters"]
    assert [(row["name"], row["problem"] is None) for row in rows] == [("a", True), ("b", True), ("c", False)]
    (here / "empty").mkdir()
    assert "empty: no adapter here or below" in printed(capsys, "list", "empty")


def test_show_says_what_is_known_and_what_is_not(here: Path, tiny_base: Path, capsys: Captured) -> None:
    out = printed(capsys, "show", "a", "--base", str(tiny_base), "--json", "a.json")
    assert "trained on poems.txt: 30 steps, 12,345 tokens, 6 s, fp32" in out
    assert "rank 2, alpha 4, scale 2" in out and "[bold]held" in out and "54.600" in out
    assert "%)" in out and "█" * 24 in out and "torch 2.13.0" in out
    read = json.loads((here / "a.json").read_text())
    assert read["modules"]["transformer.h.1.attn.c_proj"]["relative"] > 0 and read["layers"].keys() == {"0", "1"}
    plain = printed(capsys, "show", "b")
    assert "no peftune.json: what it was trained on, for how long and how well is not known" in plain


def test_a_peftune_json_of_another_program_is_shown_as_far_as_it_can_be_read(here: Path, capsys: Captured) -> None:
    odd = {
        "recipe": {"data": {"train": ["x", {}]}}, "step": "ten", "metrics": {"a": 1, "b": {"adapter": {"loss": "low"}}},
        "combined": {"adapters": [1, {}], "relative_error": "none"}, "extracted": {"tuned": 3}, "versions": [1],
        "data_fingerprints": 7, "identity": [],
    }  # fmt: skip
    (here / "a" / "peftune.json").write_text(json.dumps(odd))
    assert "extracted from 3" in printed(capsys, "show", "a")
    assert "2 adapters in ." in printed(capsys, "list", ".")
    assert "norm, first" in printed(capsys, "compare", "a", "b")


def test_combined_adapters_go_through_every_other_verb(here: Path, tiny_base: Path, capsys: Captured) -> None:
    base = str(tiny_base)
    out = printed(capsys, "combine", "a", "b", "--weights", "-0.5,1", "--out", "c", "--json", "c.json")
    assert "c: -0.5 x a + 1 x b, exact to rounding: 4 modules, rank 5, relative error" in out
    cut = printed(capsys, "combine", "a", "b", "--weights", "1,1", "--rank", "3", "--out", "d")
    assert "h.0.attn.c_attn" in cut and "the nearest of rank 3" in cut and "%" in cut
    assert json.loads((here / "c.json").read_text())["relative_error"] < 1e-6
    assert "combined from -0.5 of a" in printed(capsys, "show", "c")
    assert "+1.000" in printed(capsys, "compare", "c", "c", "--json", "cc.json")
    assert json.loads((here / "cc.json").read_text())["same_base"] is True
    (here / "t.txt").write_text("the cat sat on the mat\n\nthe dog sat on the log\n")
    assert main.run(["eval", "--adapter", "c", "--data", "t=t.txt", "--json", "e.json"]) == 0
    rows = json.loads((here / "e.json").read_text())["rows"]
    assert rows["base"]["t"]["loss"] != rows["c"]["t"]["loss"]
    assert main.run(["generate", "--adapter", "c", "--prompt", "the", "--max-new-tokens", "3", "--seed", "1"]) == 0
    assert main.run(["merge", "c", "--out", "m"]) == 0
    extracted = printed(
        capsys, "extract", "--base", base, "--tuned", "m", "--rank", "5", "--out", "x", "--json", "x.json"
    )
    assert "not changed by the fine-tune, and so left out: 4 modules" in extracted
    assert json.loads((here / "x.json").read_text())["relative_error"] < 1e-5
    same = printed(capsys, "compare", "c", "x")
    assert "both are adapters of the same base" in same and "combined" in same and "extracted" in same


def test_bad_input_is_one_line_and_leaves_nothing(here: Path, tiny_base: Path, capsys: Captured) -> None:
    before = sorted(here.iterdir())
    assert "No such file or directory" in refused(capsys, "list", "none")
    assert "no adapter_config.json" in refused(capsys, "show", str(tiny_base))
    assert "No such file or directory" in refused(capsys, "compare", "a", "none")
    assert "exists already" in refused(capsys, "combine", "a", "b", "--weights", "1,1", "--out", "a")
    assert "1 given for 2 adapters" in refused(capsys, "combine", "a", "b", "--weights", "1", "--out", "c")
    assert "File name too long" in refused(capsys, "combine", "a", "--weights", "1", "--out", "x" * 5000)
    base = ["extract", "--base", str(tiny_base), "--rank", "2", "--out", "c"]
    assert "the same weights" in refused(capsys, *base, "--tuned", str(tiny_base))
    assert "it is an adapter" in refused(capsys, *base, "--tuned", "./a")
    assert "no/f: cannot be written" in refused(capsys, "show", "a", "--json", "no/f")
    assert sorted(here.iterdir()) == before


def test_a_disk_that_cannot_be_written_is_one_line(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(here.iterdir())
    monkeypatch.setattr("peftune.adapters.directory.os.fsync", full)
    assert "No space left" in refused(capsys, "combine", "a", "--weights", "1", "--out", "new/c")
    assert [path for path in sorted(here.rglob("*")) if path.name == "c"] == [] and set(before) <= set(here.iterdir())


def test_tables_are_not_cut_in_a_pipe(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    row = next(line for line in printed(capsys, "list", ".").splitlines() if line.startswith("│a "))
    assert "attention" in row and "30" in row and "[bold]held 4.000" in row


def test_the_help_of_a_process_is_instant_and_complete() -> None:
    code = "import sys; from peftune.cli import main; main.run(['adapters', '--help']); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("False\n")
    assert all(verb in done.stdout for verb in VERBS)
