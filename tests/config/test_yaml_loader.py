"""YAML of any kind is read or refused in one line, and soon."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import damaged_bytes, damaged_values, deadline, fuzz, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st

from peftune.cli.launcher import configuration
from peftune.cli.main import run
from peftune.config.recipe import load_recipe, recipe_from
from peftune.config.yaml_loader import parse_yaml
from peftune.errors import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 9)
)
TOO_MUCH = [
    (BOMB, "at most 10,000 values"),
    (MERGES, "at most 10,000 values"),
    ("data: " + BOMB.replace("\n", "\n  "), "not valid YAML"),
    ("a: &a [*a]", "stands inside of what it names"),
    ("a: &a {b: {c: *a}}", "stands inside of what it names"),
    ("[" * 100_000, "nested at most 30 deep"),
    ("{a: " * 100_000, "nested at most 30 deep"),
    ("- " * 100_000, "nested at most 30 deep"),
    ("[" + "1, " * 100_000 + "]", "at most 10,000 values"),
    ("".join(f"k{n}: 1\n" for n in range(60_000)), "at most 10,000 values"),
    ("a: " + "1" * 500_000, "a number of 500,000 characters"),
    ("a: 0x" + "f" * 500_000, "a number of 500,002 characters"),
    ("a: 1" + ":59" * 200_000, "a number of 600,001 characters"),
    ("a: 1" + ":59" * 200_000 + ".5", "a number of 600,003 characters"),
    ("a: " + "1" * 300_000 + "e5", "a number of 300,002 characters"),
    ("a: !!python/object/apply:os.system [true]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not"),
    ("a: !!timestamp x", "is not known here"),
    ("a: !!int ''", "is not known here"),
    ("a: !!bool x", "is not known here"),
    ("a: !!float .", "is not known here"),
    ("a: 2001-99-99", "month must be in 1..12"),
    ("a: 0x_", "invalid literal"),
    ("? {a: 1}\n: 2", "unhashable"),
    ("<<: 5", "expected a mapping or list of mappings"),
    ("a: =", "could not determine a constructor"),
    ("a: *b", "found undefined alias"),
    ("%YAML 9.9\n---\na: 1", "not valid YAML"),
    ("a: 1\n---\nb: 2", "not valid YAML"),
    ("a: \x00", "not valid YAML"),
]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught, deadline(60):
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(("text", "expected"), TOO_MUCH, ids=[text[:30] for text, _ in TOO_MUCH])
def test_what_is_too_much_or_too_odd_is_refused_soon(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    started = time.process_time()
    assert expected in refusal(tmp_path / "r.yaml")
    assert time.process_time() - started < 10


def test_parts_may_be_named_and_repeated() -> None:
    value = parse_yaml("a: &x {path: p, text: t}\nb: [*x, *x]\nc: {<<: *x, text: u}\nd: !!str 12\ne: '5'\nf: 2e-4")
    part = {"path": "p", "text": "t"}
    assert value == {"a": part, "b": [part, part], "c": {"path": "p", "text": "u"}, "d": "12", "e": "5", "f": 2e-4}


def test_only_a_file_of_sensible_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "cannot read the recipe: it is not a file" in refusal(tmp_path / "pipe")
    assert "cannot read the recipe: it is not a file" in refusal(tmp_path)
    assert "cannot read the recipe: it is not a file" in refusal(Path("/dev/zero"))
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(1 << 30)
    assert "1,073,741,824 bytes; expected at most 1,048,576" in refusal(tmp_path / "big.yaml")
    assert "No such file" in refusal(tmp_path / "none")
    assert "null byte" in refusal(Path("a\0b"))


@pytest.mark.parametrize("text", [BOMB, "[1]", "num_processes: [2]", "num_processes: 99999999999", "num_processes: -1",
                                  "deepspeed_config: [1]", "deepspeed_config: {deepspeed_config_file: 5}"])  # fmt: skip
def test_a_configuration_is_read_as_carefully(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGLEVEL", "INFO")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: "), deadline(60):
        configuration.read(str(tmp_path / "c.yaml"), None, 1)


def test_an_error_line_shows_control_characters_and_sends_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text('"\\e[2J\\e]0;title\\a": 1\n')
    assert run(["train", str(tmp_path / "r.yaml")]) == 2
    error = capfd.readouterr().err
    assert "\N{REPLACEMENT CHARACTER}[2J" in error and "\x1b" not in error and "\x07" not in error


VALID: dict[str, Any] = {
    "base": "gpt2",
    "quantize": None,
    "data": {"train": [{"path": "a.txt", "text": "t"}, "b"], "validation": {"a": ["c"]}, "block_size": 64},
    "lora": {"rank": 4, "alpha": 8, "targets": ["c_attn"], "layers": [0, 1]},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.99], "steps": 3, "warmup": 1},
    "batch": {"global_size": 4, "micro_size": "auto"},
    "run": {"out": "o", "seed": 1, "samples": ["the"], "track": []},
}


def _text_of(value: Any) -> str:
    try:
        return str(yaml.safe_dump(value, allow_unicode=True))
    except RecursionError:
        return "{"


@fuzz(60)
@given(text=damaged_values(VALID).map(_text_of))
def test_any_recipe_of_values_is_read_or_refused(text: str) -> None:
    with deadline():
        read_or_refuse(lambda: recipe_from(_mapping(text), []))


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(value, dict):
        raise UserError("no mapping")
    return value


@fuzz(60)
@given(content=damaged_bytes(_text_of(VALID).encode()))
def test_any_file_of_a_recipe_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    with deadline():
        read_or_refuse(lambda: load_recipe(path))


@fuzz(150)
@given(
    override=st.text(max_size=30)
    | st.builds("{}={}".format, st.sampled_from(["base", "optim.lr", "data.train", "a." * 5_000 + "b", "x" * 5_000]),
                st.text(st.sampled_from("[]{}:,&*!|>'\"%@`#?- \n\t0x1e9._<=~a\x1b\ud800"), max_size=30))
)  # fmt: skip
def test_any_override_is_taken_or_refused(override: str) -> None:
    with deadline():
        read_or_refuse(lambda: recipe_from(VALID, [override]))
