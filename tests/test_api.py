"""What `import peftune` offers: complete, lazy, and as docs/api.md shows it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peftune

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_can_be_imported() -> None:
    assert sorted(peftune.__all__) == peftune.__all__ == dir(peftune)
    for name in peftune.__all__:
        value = getattr(peftune, name)
        assert name == "__version__" or (value.__name__ == name and value.__doc__), name


def test_the_page_has_what_the_code_says_today() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "build_api_reference.py"))["page"](PAGE)
    assert made == PAGE, "run: python docs/build_api_reference.py"


def test_the_reference_has_every_public_name_and_all_that_other_pages_import() -> None:
    placed = set(re.findall(r"<!-- (peftune[\w.]*) -->", PAGE))
    for name in peftune.__all__:
        assert f"peftune.{name}" in placed or name in ("Recipe", "__version__"), name  # these two in prose
    imported: set[str] = set()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found = re.findall(r"^ *from (peftune[\w.]*) import ([\w, ]+)$", block, re.MULTILINE)
            imported |= {f"{module}.{name.strip()}" for module, names in found for name in names.split(",")}
    homes = {f"peftune.{home}.{name}" for name, home in peftune._HOMES.items()}
    examples = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    shown = {name for name in placed if re.search(rf"\b{name.rpartition('.')[2]}\(", examples)}
    results = {
        "Plan",
        "Option",
        "Delivery",
        "Generation",
        "LoadedAdapter",
        "Route",
        "MergeReport",
    }  # others return them
    assert {name.rpartition(".")[2] for name in placed - shown} == results | {"PeftuneError", "UserError"}
    own = {"peftune.config.recipe.Source", "peftune.model.base.open_base", "peftune.model.load.load_model"}  # in prose
    assert len(imported) > 10
    assert imported - homes - own <= placed


def test_a_name_that_is_not_offered_is_an_attribute_error_that_lists_what_is() -> None:
    with pytest.raises(AttributeError, match="offers AdapterBank"):
        peftune.nothing  # noqa: B018


def test_importing_costs_nothing() -> None:
    """Less than 50 ms beyond the interpreter itself: nothing but the standard library is imported."""
    code = "import sys; before = set(sys.modules); import peftune; print(*sorted(set(sys.modules) - before))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in answer.stdout.split()} <= {"peftune"} | set(sys.stdlib_module_names)


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"the sea is wide and the storm came over night number {n}" for n in range(60)]
    (tmp_path / "poems.txt").write_text("\n\n".join(lines))
    (tmp_path / "held-out.txt").write_text("\n\n".join(line.replace("sea", "shore") for line in lines[:9]))
    (tmp_path / "recipe.yaml").write_text("base: builtin:small\ndata: {train: poems.txt}\nrun: {out: adapters/x}\n")
    (tmp_path / "fleet.yaml").write_text(
        "base: builtin:small\ndata: {train: poems.txt, block_size: 64}\nrun: {out: adapters}\n"
        "fleet: [{name: a}, {name: b, lora.rank: 4}]\n"
    )
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == PAGE.count("```python") > 20
    shared: dict[str, object] = {}
    began = time.monotonic()
    for number, example in enumerate(examples):
        exec(compile(example, f"docs/api.md, example {number + 1}", "exec"), shared)
    assert (tmp_path / "models" / "poems" / "model.safetensors").is_file(), time.monotonic() - began
    assert shared["found"]["rows"].keys() == {"base", "poems"}  # type: ignore[index]
    assert shared["best"].layout.way == "ddp"  # type: ignore[attr-defined]
    assert (tmp_path / "gguf" / "poems" / "model.gguf").is_file()


_LISTS = {  # what takes several, given one string: each would take it letter by letter
    "prompts of a bank": lambda base: peftune.AdapterBank(base).generate("abc"),
    "stop": lambda base: peftune.GenerationSettings(stop="END"),
    "overrides": lambda base: peftune.load_recipe("none.yaml", "optim.lr=1"),
    "paths": lambda base: peftune.load_recipes("recipe.yaml"),
    "texts": lambda base: peftune.merge("none", "out", texts="abc"),
    "data": lambda base: peftune.evaluate(base, "held-out.txt"),
    "adapters": lambda base: peftune.evaluate(base, {"poems": "held-out.txt"}, "adapters/poems"),
    "recipe": lambda base: peftune.train("recipe.yaml"),
}


def test_a_recipe_is_made_of_values_as_of_a_file(tmp_path: Path) -> None:
    values = {"base": "builtin:small", "data": {"train": "poems.txt"}, "run": {"out": "adapters/x"}}
    (tmp_path / "recipe.yaml").write_text("base: builtin:small\ndata: {train: poems.txt}\nrun: {out: adapters/x}\n")
    assert peftune.load_recipe(values, ["lora.rank=4"]) == peftune.load_recipe(
        tmp_path / "recipe.yaml", ["lora.rank=4"]
    )
    assert values["data"] == {"train": "poems.txt"} and "lora" not in values, "the values given are not changed"
    with pytest.raises(peftune.UserError, match=r"^recipe: unknown key optim\.lrr.*lr"):
        peftune.load_recipe(values | {"optim": {"lrr": 1}})


@pytest.mark.parametrize("what", _LISTS)
def test_a_string_in_the_place_of_several_is_refused_by_name(what: str, tiny_base: Path) -> None:
    with pytest.raises(peftune.UserError, match=rf"^{what.split()[0] if what != 'recipe' else 'train'} .*expected"):
        _LISTS[what](str(tiny_base))


def test_one_prompt_may_be_a_string_where_that_is_said(tiny_base: Path) -> None:
    settings = peftune.GenerationSettings(max_new_tokens=2, temperature=0)
    (alone,) = peftune.generate("the cat", tiny_base, settings=settings)
    assert peftune.generate(["the cat"], str(tiny_base), settings=settings) == [alone]
