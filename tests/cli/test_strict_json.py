"""Every verb that writes JSON writes what any parser reads, or ends with exit code 4 and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftune.cli import main
from peftune.files import parse_json

VERBS = {
    "data": "data text.jsonl --base BASE",
    "eval": "eval --base BASE --adapter a --data x=text.jsonl",
    "routing": "eval --routing --base BASE --adapter a --adapter b --data a=text.jsonl",
    "generate": "generate --base BASE --adapter a --prompt the --max-new-tokens 3",
    "list": "adapters list .",
    "show": "adapters show a --base BASE",
    "show zero": "adapters show zero --base BASE",
    "compare": "adapters compare a b",
    "compare zero": "adapters compare a zero",
    "compare zeros": "adapters compare zero zero",
    "combine": "adapters combine a b --weights 0.5,0.5 --out new --base BASE",
    "combine zero": "adapters combine zero zero --weights 1,1 --out new --base BASE",
    "merge": "merge a --base BASE --out new",
    "extract": "adapters extract --base BASE --tuned tuned --rank 2 --out new",
}


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_strict(here: Path, tiny_base: Path, verb: str) -> None:
    code = main.run([*VERBS[verb].replace("BASE", str(tiny_base)).split(), "--json", "f.json"])
    assert code in ((0, 2) if "zero" in verb else (0,))
    if code == 0:
        assert parse_json(Path("f.json").read_bytes())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "zero" not in verb])
def test_json_on_stdout_stands_alone(here: Path, tiny_base: Path, verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run([*VERBS[verb].replace("BASE", str(tiny_base)).split(), "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert isinstance(parse_json(out), dict) and err == "" and not Path("-").exists()


@pytest.mark.parametrize("verb", ["eval", "routing", "generate", "show", "combine", "extract"])
def test_on_a_base_that_is_not_finite_nothing_is_called_a_result(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    code = main.run([*VERBS[verb].replace("BASE", "broken").split(), "--json", "f.json"])
    assert "Traceback" not in capsys.readouterr().err
    if code == 0:
        assert verb in ("show", "combine") and parse_json(Path("f.json").read_bytes())
    else:
        assert code in (2, 4) and not Path("f.json").exists() and not Path("new").exists()
