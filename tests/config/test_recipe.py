"""A recipe is validated whole: every problem in one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftune.config.recipe import Recipe, load_recipe, recipe_from
from peftune.errors import UserError

GOOD: dict[str, Any] = {"base": "gpt2", "data": {"train": ["a.txt"]}, "run": {"out": "adapters/a"}}


def changed(*overrides: str) -> Recipe:
    return recipe_from(GOOD, list(overrides), "r.yaml")


def complaint(*overrides: str) -> str:
    """The message of a recipe that must be refused, which is one line."""
    with pytest.raises(UserError) as caught:
        changed(*overrides)
    assert "\n" not in str(caught.value)
    assert "Source" not in str(caught.value), "our class names mean nothing to a person"
    return str(caught.value)


BROKEN = [
    ("base=3", "base: expected text, found 3"),
    ("base=", "base: expected some text"),
    ("base=null", "base: expected text, found nothing"),
    ("lora.variant=loftq", "lora.variant: loftq is for a quantised base; give quantize (int8, nf4)"),
    ("quantize=int7", "quantize: expected 'int8' or 'nf4', found 'int7'"),
    ("lora=3", "lora: expected a section"),
    ("lora=null", "lora: expected a section"),
    ("run=adapters/a", "run: expected a section"),
    ("data=[]", "data: expected a section"),
    ("data.train=[]", "data.train: expected at least one"),
    ("data.train=3", "data.train: expected a list"),
    ("data.train=[3]", "data.train.0: expected"),
    ("data.train=''", "data.train.0.path: expected some text"),
    ("data.train={path: a, prompt: p}", "data.train.0: prompt and completion go together"),
    ("data.train={path: a, text: t, messages: m}", "data.train.0: give one of text"),
    (
        "data.train={path: a, delimiter: ';;'}",
        """data.train.0.delimiter: expected one character such as ";" """.strip(),
    ),
    ("data.train={path: a, where: x}", "data.train.0.where: expected a section"),
    ("data.train={path: a, where: {}}", "data.train.0.where: expected at least one"),
    (
        "data.train={path: a, where: {d: {e: f}}}",
        "data.train.0.where: column 'd': expected a value or a list of values",
    ),
    ("data.train={path: a, where: {d: []}}", "data.train.0.where: column 'd': expected a value or a list of values"),
    ("data.train={path: a, on_bad_row: drop}", "data.train.0.on_bad_row: expected 'refuse' or 'skip', found 'drop'"),
    ("data.on_bad_row=null", "data.on_bad_row: expected 'refuse' or 'skip'"),
    ("data.train={pth: a}", "data.train.0.path is missing; unknown key data.train.0.pth, did you mean path?"),
    ("data.validation=2", "data.validation: expected a fraction below 1"),
    ("data.validation=1", "data.validation: expected a fraction below 1"),
    ("data.validation=-0.1", "data.validation: expected a fraction below 1"),
    ("data.validation=true", "data.validation: expected a fraction below 1"),
    ("data.validation=null", "data.validation: expected a fraction below 1"),
    ("data.validation=[]", "data.validation: expected a fraction below 1"),
    ("data.validation={}", "data.validation: expected a fraction below 1"),
    ("data.validation={poems: []}", "data.validation.poems: expected at least one"),
    ("data.validation={poems: 3}", "data.validation.poems: expected a list"),
    ("data.validation={internet: 3}", "data.validation.internet: expected a list"),
    ("data.validation={path: x, tex: y}", "unknown key data.validation.0.tex, did you mean text?"),
    ("data.validation={poems: {pth: x}}", "poems.0.path is missing; unknown key data.validation.poems.0.pth"),
    *(
        (f"{key}=1e38", f"{key}: expected a number less than or equal to 1000000000, found 1e+38")
        for key in ("lora.alpha", "optim.lr", "optim.lr_b_ratio", "optim.epochs", "optim.clip", "optim.neftune")
    ),
    ("optim.steps=1" + "0" * 30, "optim.steps: expected a number less than or equal to 1000000000"),
    ("data.block_size=4", "data.block_size: expected a whole number of at least 8, or auto, found 4"),
    ("data.block_size=1.5", "data.block_size: expected a whole number"),
    ("data.block_size=big", "data.block_size: expected a whole number"),
    ("data.packing=maybe", "data.packing: expected true or false, found 'maybe'"),
    ("data.join=x", "data.join: expected ' ' or ''"),
    ("data.split_on=paragraph", "data.split_on: expected 'auto', 'blank-line'"),
    ("lora.rank=0", "lora.rank: expected a number greater than or equal to 1, found 0"),
    ("lora.rank=true", "lora.rank: expected a whole number, found True"),
    ("lora.rank='8'", "lora.rank: expected a whole number, found '8'"),
    ("lora.alpha=-1", "lora.alpha: expected a number greater than 0"),
    ("lora.dropout=1", "lora.dropout: expected a number less than 1"),
    ("lora.targets=[]", "lora.targets: expected all, attention, query-value, or a list"),
    ("lora.targets=qkv", "lora.targets: expected all, attention, query-value, or a list"),
    ("lora.targets=[3]", "lora.targets: expected all, attention, query-value, or a list"),
    ("lora.variant=qlora", "lora.variant: expected 'lora', 'rslora', 'dora', 'pissa' or 'loftq'"),
    ("lora.layers=[-1]", "lora.layers.0: expected a number greater"),
    ("lora.layers=[]", "lora.layers: expected at least one"),
    ("lora.modules_to_save=wte", "lora.modules_to_save: expected a list, such as"),
    ("optim.lr=0", "optim.lr: expected a number greater than 0"),
    ("optim.lr=fast", "optim.lr: expected a number, found 'fast'"),
    ("optim.lr=.inf", "optim.lr: expected a finite number"),
    ("optim.lr=.nan", "optim.lr: expected a finite number"),
    ("optim.lr.peak=1", "optim.lr: expected a number, found {'peak': 1}"),
    ("optim.schedule=cosin", "optim.schedule: expected 'linear', 'cosine' or 'constant'"),
    ("optim.betas=[0.9]", "optim.betas.1 is missing"),
    ("optim.betas=0.9", "optim.betas: expected a list of two numbers"),
    ("optim.betas=[0.9, 1.0]", "optim.betas.1: expected a number less than 1"),
    ("optim.clip=0", "optim.clip: expected a number greater than 0"),
    ("optim.epochs=0", "optim.epochs: expected a number greater than 0"),
    ("optim.steps=1.5", "optim.steps: expected a whole number"),
    ("optim.warmup=-1", "optim.warmup: expected a number greater"),
    ("batch.global_size=0", "batch.global_size: expected a number greater"),
    ("batch.micro_size=many", "batch.micro_size: expected a whole number of at least 1, or auto"),
    ("batch.micro_size=64", "batch: micro_size 64 is larger than global_size 32"),
    ("run.out=", "run.out: expected some text"),
    ("run.seed=-1", "run.seed: expected a number greater"),
    ("run.precision=fp8", "run.precision: expected 'auto', 'fp32', 'bf16' or 'fp16'"),
    ("run.resume=no", "run.resume: expected 'auto' or 'never', found False"),
    ("run.track=[mlfow]", "run.track.0: expected 'tensorboard'"),
    ("run.checkpointing=1", "run.checkpointing: expected true or false"),
    ("optim.lr", "override 'optim.lr': expected key=value"),
    ("=3", "override '=3': expected key=value"),
    ("optim=[", "'[' is not a YAML value"),
    ("base.x=1", "base is not a section"),
]


@pytest.mark.parametrize(("override", "expected"), BROKEN, ids=[override for override, _ in BROKEN])
def test_a_broken_value_is_refused_in_one_line_that_names_the_key(override: str, expected: str) -> None:
    message = complaint(override)
    assert expected in message
    assert ("; " in message) == ("; " in expected), "one problem is told once"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora.rnk", "unknown key lora.rnk, did you mean rank?"),
        ("adapter", "unknown key adapter, did you mean run.init?"),
        ("data.validtion", "unknown key data.validtion, did you mean validation?"),
        ("optm.lr", "unknown key optm, did you mean optim?"),
        ("lr", "unknown key lr, did you mean optim.lr?"),
        ("optim.rank", "unknown key optim.rank, did you mean lora.rank?"),
        ("run.gradient_checkpointing", "unknown key run.gradient_checkpointing, did you mean checkpointing?"),
        ("batch.zzz", "unknown key batch.zzz, known here: global_size, micro_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, hint: str) -> None:
    assert hint in complaint(f"{key}=1")


def test_all_problems_are_listed_at_once() -> None:
    message = complaint("lora.rank=0", "optim.lr=-1", "run.oot=x", "data.block_size=3")
    for key in ("lora.rank", "optim.lr", "run.oot", "data.block_size"):
        assert key in message


def test_what_is_missing_is_listed_at_once() -> None:
    with pytest.raises(UserError, match="base is missing; data is missing; run is missing"):
        recipe_from({}, [])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.variant=pissa"], "lora.variant: pissa takes its start out of the base's weights"),
        (["lora.modules_to_save=[ln_f, c_attn]"], "lora.modules_to_save: c_attn cannot be trained"),
        (["lora.modules_to_save=[mlp.c_proj]"], "lora.modules_to_save: mlp.c_proj cannot be trained"),
    ],
)
def test_what_a_quantised_base_cannot_bear_is_refused(overrides: list[str], expected: str) -> None:
    assert expected in complaint("quantize=int8", *overrides)


def test_early_stopping_needs_something_to_watch() -> None:
    assert "run.early_stopping needs" in complaint("run.early_stopping=2", "data.validation=0")
    assert "run.early_stopping needs" in complaint("run.early_stopping=2", "run.eval_every=0")


def test_overrides_win_and_leave_the_mapping_alone() -> None:
    recipe = changed("optim.lr=1e-4", "lora.targets=[c_attn]", "data.validation={poems: p.txt}", "run.out=b")
    assert (recipe.optim.lr, recipe.lora.targets, recipe.run.out) == (1e-4, ["c_attn"], "b")
    assert isinstance(recipe.data.validation, dict)
    assert GOOD["run"] == {"out": "adapters/a"}


def test_an_override_fills_a_section_that_is_empty_in_the_file() -> None:
    assert recipe_from(GOOD | {"optim": None}, ["optim.lr=1e-3"]).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("2E-4", 2e-4), (".2e-3", 2e-4), ("1_0e-5", 1e-4), ("1", 1.0)]
)
def test_a_rate_is_a_number_as_people_write_it(text: str, value: float) -> None:
    assert changed(f"optim.lr={text}").optim.lr == pytest.approx(value)


def test_a_source_may_be_a_string_a_mapping_or_a_list() -> None:
    for written in ("a.txt", "{path: a.txt}", "[a.txt]", "[{path: a.txt}]"):
        assert [source.path for source in changed(f"data.train={written}").data.train] == ["a.txt"]


def test_validation_may_be_a_fraction_sources_or_domains() -> None:
    assert changed("data.validation=0.1").data.validation == 0.1
    assert changed("data.validation=0").data.validation == 0
    sources = changed("data.validation=held.txt").data.validation
    assert isinstance(sources, list) and sources[0].path == "held.txt"
    domains = changed("data.validation={a: a.txt, b: [b.txt, c.txt]}").data.validation
    assert isinstance(domains, dict) and [len(found) for found in domains.values()] == [1, 2]
    assert list(recipe_from(GOOD, ["data.validation={2024: a.txt}"]).data.validation) == ["2024"]  # type: ignore[arg-type]


def test_a_recipe_survives_json() -> None:
    recipe = changed("data.validation={a: a.txt}", "lora.layers=[0, 1]")
    assert recipe_from(recipe.model_dump(mode="json"), []) == recipe


FILES = {
    "empty": (b"", "expected a mapping with base, data and run, found nothing"),
    "list": (b"- a\n", "expected a mapping with base, data and run, found a list"),
    "text": (b"hello\n", "expected a mapping with base, data and run, found a str"),
    "tab": (b"base:\n\tgpt2\n", "not valid YAML"),
    "latin-1": ("base: caf\u00e9\n".encode("latin-1"), "not UTF-8 at byte 9"),
    "twice": (b"base: a\nbase: b\n", "key base is given twice"),
    "object": (b"base: !!python/object:os.system {}\n", "not valid YAML"),
    "two documents": (b"base: a\n---\nbase: b\n", "not valid YAML"),
    "control character": (b"base: \x01\n", "not valid YAML"),
    "deep": (b"base: " + b"[" * 5000 + b"\n", "not valid YAML"),
    "number as key": (b"1: x\n", "1: keys should be strings"),
    "date": (b"base: 2026-01-01\ndata: {train: a}\nrun: {out: b}\n", "base: expected text"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read the recipe"):
            load_recipe(path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: gpt2\r\ndata: {train: a.txt}\r\nrun: {out: b}\r\n")
    assert load_recipe(path, ["optim.steps=3"]).optim.steps == 3


def test_a_tilde_in_run_out_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = {"base": "gpt2", "data": {"train": "a.txt"}, "run": {"out": "-"}}
    assert recipe_from(values, ["run.out=~/adapters/a"]).run.out == "/home/me/adapters/a"
    assert recipe_from(values, ["run.out=a~b"]).run.out == "a~b"


def test_a_date_in_where_is_its_text() -> None:
    [source] = changed("data.train={path: a, where: {day: 2024-05-01, 2024: [1, x]}}").data.train
    assert source.where == {"day": "2024-05-01", "2024": [1, "x"]}


def test_a_source_that_says_nothing_of_bad_rows_is_read_as_the_section_says() -> None:
    data = changed("data.train=[a, {path: b, on_bad_row: refuse}]", "data.on_bad_row=skip").data
    assert [source.on_bad_row for source in data.read_as(data.train)] == ["skip", "refuse"]
