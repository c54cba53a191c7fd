"""Directories that somebody made to do harm: readers change nothing, follow nothing into a trap, and never hang."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import deadline, read_or_refuse

from peftune.adapters.directory import read_adapter, write_adapter
from peftune.adapters.edit.combine import combine
from peftune.adapters.edit.extract import extract
from peftune.adapters.inspect.compare import compare
from peftune.adapters.inspect.describe import describe
from peftune.adapters.inspect.scan import scan
from peftune.adapters.merge.merge import merge
from peftune.errors import PeftuneError, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VERBS: dict[str, Callable[[Path, Base, Path], Any]] = {
    "show": lambda adapter, base, out: describe(adapter, base.name),
    "list": lambda adapter, base, out: scan(adapter.parent),
    "compare": lambda adapter, base, out: compare(adapter, adapter),
    "combine": lambda adapter, base, out: combine([adapter, adapter], [1.0, 1.0], out, base=base.name),
    "merge": lambda adapter, base, out: merge(adapter, out, base.name),
    "extract": lambda adapter, base, out: extract(base.name, str(adapter), 2, out),
    "eval": lambda adapter, base, out: evaluate(base, {"x": []}, {"a": adapter}),
    "serve": lambda adapter, base, out: AdapterBank(base).add("a", adapter),
    "beams": lambda adapter, base, out: generate(
        "the", base, adapter, settings=GenerationSettings(max_new_tokens=1, temperature=0, beams=2)
    ),
}


def tree(root: Path) -> dict[str, str]:
    """Every name below a directory with its content, the target of a link, or its kind."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        elif path.is_file() and path.stat().st_size < 1e7:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = f"mode {path.stat().st_mode:o}, {path.stat().st_size if path.is_file() else 0} bytes"
    return found


def link_to_commit(evil: Path, good: Path) -> None:
    (evil / ".commit").symlink_to(good)


def unfinished_write(evil: Path, good: Path) -> None:
    shutil.copytree(good, evil / ".commit")
    (evil / CONFIG).unlink()


def links_to_files(evil: Path, good: Path) -> None:
    for name in (CONFIG, TENSORS):
        (evil / name).unlink()
        (evil / name).symlink_to(good / name)
    for name in ("checkpoints", "tokenizer.json", "README.md", "peftune.json"):
        (evil / name).unlink(missing_ok=True)
        (evil / name).symlink_to(Path("..") / "good" / name)


def pipes(evil: Path, good: Path) -> None:
    (evil / TENSORS).unlink()
    for name in (TENSORS, "peftune.json", "tokenizer.json"):
        os.mkfifo(evil / name)


def endless_devices(evil: Path, good: Path) -> None:
    for name in (TENSORS, CONFIG):
        (evil / name).unlink()
        (evil / name).symlink_to("/dev/zero")


def a_huge_hole(evil: Path, good: Path) -> None:
    os.truncate(evil / TENSORS, 1 << 42)


TRAPS = [link_to_commit, unfinished_write, links_to_files, pipes, endless_devices, a_huge_hole]


@pytest.mark.parametrize("trap", TRAPS)
def test_no_reading_verb_changes_anything_beside_it(
    trap: Any, make_adapter: Any, tiny_base: Path, tmp_path: Path
) -> None:
    good, evil, out = make_adapter("trees/good"), make_adapter("trees/evil"), tmp_path / "out"
    (good / "checkpoints" / "step-1").mkdir(parents=True)
    (good / "checkpoints" / "step-1" / "state.json").write_text("{}")
    trap(evil, good)
    before = tree(tmp_path / "trees")
    base = Base(tiny_base, str(tiny_base))
    for verb in VERBS.values():
        with deadline(120):
            read_or_refuse(lambda verb=verb: verb(evil, base, out))
        shutil.rmtree(out, ignore_errors=True)
    assert tree(tmp_path / "trees") == before


def test_links_to_files_are_read_as_the_cache_of_a_hub_has_them(make_adapter: Any) -> None:
    good, linked = make_adapter("good"), make_adapter("linked")
    links_to_files(linked, good)
    (linked / "peftune.json").unlink()
    assert read_adapter(linked).fingerprint == read_adapter(good).fingerprint


@pytest.mark.parametrize("inside", ["nothing", "a link", "a directory"])
def test_a_writer_completes_only_what_it_left_itself(make_adapter: Any, inside: str) -> None:
    adapter, out = read_adapter(make_adapter("adapter")), make_adapter("out")
    (out.parent / "theirs").mkdir()
    (out.parent / "theirs" / CONFIG).write_text("{}")
    if inside == "nothing":
        (out / ".commit").symlink_to(out.parent / "theirs")
    else:
        (out / ".commit").mkdir()
        (out / ".commit" / CONFIG).write_text("{}")
        kept = out / ".commit" / "kept"
        kept.symlink_to(out.parent / "theirs" / CONFIG) if inside == "a link" else kept.mkdir()
    before = tree(out.parent)
    with pytest.raises(UserError, match="not what an interrupted write of peftune leaves; move it away"):
        write_adapter(out, adapter.config, adapter.tensors, {}, {})
    assert tree(out.parent) == before


SLOW = r"(([a-z._0-9]|.)+)+[^a-z]"
HOSTILE_PATTERNS: list[dict[str, Any]] = [
    {"target_modules": "(.*.*)*(a+)+$.*!"},
    {"target_modules": SLOW},
    {"exclude_modules": SLOW},
    {"rank_pattern": {"(.*.*)*(a+)+$.*!": 4}},
    {"rank_pattern": {SLOW: 4}},
    {"alpha_pattern": {SLOW: 4.0}},
    {"rank_pattern": {f"x{number}": 1 for number in range(20_000)}},
    {"modules_to_save": [SLOW]},
    {"layers_to_transform": [1], "layers_pattern": SLOW},
    {"layers_to_transform": [1], "layers_pattern": ["h", SLOW]},
    {"target_modules": "(" * 3_000},
    {"target_modules": "(" * 1_500 + "a" + ")" * 1_500},
    {"target_modules": "a" * 1_000_000},
    {"target_modules": [f"x{number}" for number in range(100_000)]},
]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftune.adapters.module_names._SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("settings", HOSTILE_PATTERNS, ids=lambda s: "-".join(s) + str(len(str(s))))
def test_a_pattern_that_takes_for_ever_is_refused_or_harmless(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter, base = make_adapter(), Base(tiny_base)
    tools.edit_config(adapter, **settings)
    with deadline(60):
        read_or_refuse(lambda: VERBS["beams"](adapter, base, tmp_path / "out"))


@pytest.mark.usefixtures("impatient")
def test_a_slow_pattern_is_named(make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter()
    tools.edit_config(adapter, target_modules=SLOW)
    with deadline(60), pytest.raises(UserError, match=r"takes more than 0.1 s to match; name the modules"):
        merge(adapter, tmp_path / "out", str(tiny_base))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(c_attn|c_fc)"},
        {"target_modules": r"^(?!.*\.0\.).*(?:attn\.c_proj|c_fc)$"},
        {"target_modules": ["c_attn", "mlp.c_proj"], "exclude_modules": r".*\.1\.mlp.*"},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {r"h\.[01]\.mlp": 3, "c_fc": 2, r"0\.attn.*": 5}},
        {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {r"h.0.mlp.c_fc": 3, "(c_attn|c_fc)": 2}},
        {"target_modules": ["c_attn", "transformer.h.0.mlp.c_fc"], "layers_to_transform": 1},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["x", "h"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "exclude_modules": ["nothing"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_patterns_mean_what_they_mean_to_peft(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(**settings)
    merge(adapter, tmp_path / "out", str(tiny_base))
    difference = (tools.logits_of(tmp_path / "out") - tools.logits_with_peft(tiny_base, adapter)).abs().max()
    assert float(difference) < 1e-4


def test_one_broken_adapter_does_not_hide_the_others(make_adapter: Any) -> None:
    good, deep = make_adapter("all/good"), make_adapter("all/deep")
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"r": ' + "1" * 5_000 + "}", '{"peft_type": "\\ud800"}'):
        (deep / CONFIG).write_text(text)
        problems = {entry.name: entry.problem for entry in scan(good.parent).entries}
        assert problems["good"] == "" and problems["deep"] != ""


def test_an_index_of_other_things_than_names_is_refused(layouts: dict[str, Path], tmp_path: Path) -> None:
    for value in ("[1]", "{}", "null", "7", '"../other/model.safetensors"', '"\\u0000"'):
        base = shutil.copytree(layouts["prefixed-shards"], tmp_path / f"base{len(list(tmp_path.iterdir()))}")
        (base / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"transformer.wte.weight": {value}}}}}')
        with pytest.raises(PeftuneError):
            _ = Base(base).weights
