"""Whatever somebody wrote into an adapter, a terminal gets text and no commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftune.adapters.directory import read_adapter, write_adapter
from peftune.cli import main
from peftune.console import Console
from peftune.model.base import Base

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2066\x08\r\nsecond line"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def evil_everywhere(value: Any) -> Any:
    """The value with every string of words, and every name of an object, followed by what a terminal obeys."""
    if isinstance(value, dict):
        return {key: evil_everywhere(child) for key, child in value.items()} | {f"more{EVIL}": EVIL}
    if isinstance(value, list):
        return [*map(evil_everywhere, value), EVIL]
    return value + EVIL if isinstance(value, str) else value


@pytest.fixture
def here(adapters: dict[str, Path], base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which adapter `a` and everything that it records is evil."""
    monkeypatch.chdir(tmp_path)
    name = f"a{EVIL}"
    plain = read_adapter(adapters["attention"])
    figures = {"loss": 4.0, "perplexity": 54.6}
    recorded = evil_everywhere({
        "base": "gpt2", "peftune": "1", "precision": "fp32", "versions": {"torch": "2"}, "step": 3,
        "recipe": {"data": {"train": [{"path": "poems.txt"}]}, "lora": {"variant": "lora"}, "quantize": "int8"},
        "metrics": {EVIL: {"base": figures, "adapter": figures}}, "data_fingerprints": {EVIL: "0" * 64},
        "combined": {"adapters": [{"weight": EVIL, "adapter": EVIL, "fingerprint": EVIL}]},
        "extracted": {"tuned": EVIL},
    })  # fmt: skip
    write_adapter(Path(name), {**plain.config, "base_model_name_or_path": EVIL}, plain.tensors, recorded, {})
    shutil.copytree(name, "b")
    (Path("b") / "peftune.json").unlink()
    (tmp_path / "t.txt").write_text("the cat sat on the mat\n")
    return tmp_path


BASE = "BASE"
CALLS: list[list[str]] = [
    ["adapters", "list", "."],
    ["adapters", "show", "A"],
    ["adapters", "show", "A", "--base", BASE],
    ["adapters", "compare", "A", "b"],
    ["adapters", "combine", "A", "b", "--weights", "1,1", "--out", "c", "--base", BASE],
    ["adapters", "combine", "A", "b", "--weights", "1,1", "--out", f"c{EVIL}"],
    ["merge", "A", "--out", f"m{EVIL}", "--base", BASE],
    ["merge", "A", "--out", "m"],
    ["eval", "--adapter", "A", "--data", f"x{EVIL}=t.txt", "--base", BASE],
    ["eval", "--adapter", "A", "--data", "t.txt"],
    ["generate", "--adapter", "A", "--prompt", "the", "--max-new-tokens", "1", "--temperature", "0", "--base", BASE],
    ["generate", "--adapter", "A", "--prompt", "the"],
    ["adapters", "show", f"none{EVIL}"],
    ["train", f"none{EVIL}"],
    [f"no-such-verb{EVIL}"],
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call)[:40].encode("ascii", "replace").decode())
def test_no_verb_prints_what_a_terminal_obeys(
    here: Path, base_directory: Path, capfd: pytest.CaptureFixture[str], call: list[str]
) -> None:
    words = [{"A": f"a{EVIL}", BASE: str(base_directory)}.get(word, word) for word in call]
    code = main.run(words)
    out, err = capfd.readouterr()
    assert code in (0, 2)
    shown = OBEYED.sub(lambda found: f"<{ord(found[0]):x}>", out + err)
    assert not OBEYED.search(out + err), shown
    if code == 2:
        assert err.count("\n") == 1, shown


BROKEN: dict[str, Callable[[Path], Any]] = {
    "a type": lambda a: edit(a, peft_type=EVIL),
    "a setting": lambda a: edit(a, r=EVIL, bias=EVIL),
    "a pattern": lambda a: edit(a, target_modules=f"({EVIL}"),
    "an unknown setting": lambda a: edit(a, **{EVIL: [1]}),
    "an initialisation": lambda a: edit(a, init_lora_weights=EVIL),
    "a tensor": lambda a: save_file({f"t{EVIL}": t for t in load_file(a / TENSORS).values()}, a / TENSORS),
    "a name twice": lambda a: (a / CONFIG).write_text(f"{json.dumps({EVIL: 1})[:-1]}, {json.dumps(EVIL)}: 2}}"),
}  # fmt: skip
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", BROKEN)
def test_no_error_quotes_what_a_terminal_obeys(
    here: Path, base_directory: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    BROKEN[name](here / "b")
    assert main.run(["merge", "b", "--out", "m", "--base", str(base_directory)]) == 2
    out, err = capfd.readouterr()
    assert not OBEYED.search(out + err) and err.count("\n") == 1 and err.startswith("peftune: ")
    assert main.run(["adapters", "list", "."]) == 0
    assert not OBEYED.search("".join(capfd.readouterr()))


def test_messages_and_stages_obey_too(capfd: pytest.CaptureFixture[str]) -> None:
    Console().say(EVIL)
    Console().stage(EVIL)
    err = capfd.readouterr().err
    assert "second line" in err and not OBEYED.search(err)


def test_a_config_of_a_base_is_quoted_safely(base_directory: Path, tmp_path: Path, capfd: Any) -> None:
    base = shutil.copytree(base_directory, tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    for changed in ({"model_type": EVIL}, {"n_head": EVIL}, {"activation_function": EVIL}):
        (base / "config.json").write_text(json.dumps(values | changed))
        assert main.run(["generate", "--base", str(base), "--prompt", "x"]) == 2
        assert not OBEYED.search("".join(capfd.readouterr()))
    assert Base(base_directory).config.n_head == 4
