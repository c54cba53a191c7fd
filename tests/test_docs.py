"""Pages that are made from the code are up to date, and what they point to is there."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

import peftune
from peftune.cli.main import app
from peftune.training.distributed.zero import refuse_for_zero3

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_recipe_reference_is_what_the_docstrings_say() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "build_recipe_reference.py"))["page"]()
    shipped = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert shipped == page, "run: python docs/build_recipe_reference.py"


def test_the_tables_of_memory_are_what_the_formulas_say() -> None:
    shipped = (ROOT / "docs" / "many-ranks.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(ROOT / "docs" / "build_memory_table.py"))["page"](shipped)
    assert shipped == page, "run: python docs/build_memory_table.py"


def test_many_ranks_names_every_shipped_configuration_and_every_refusal() -> None:
    page = (ROOT / "docs" / "many-ranks.md").read_text(encoding="utf-8")
    names = {path.stem.removeprefix("multi-node-") for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert [name for name in sorted(names - {"cpu", "gpu"}) if name not in page] == []
    refusals = inspect.getsource(refuse_for_zero3)
    assert [key for key in set(re.findall(r"\b(?:run|lora)\.\w+", refusals)) if key not in page] == []


def test_every_recipe_key_is_explained() -> None:
    from peftune.config.data_section import DataSection, Source
    from peftune.config.recipe import BatchSection, LoraSection, OptimSection, Recipe, RunSection

    fields = [
        (s, name, f)
        for s in (Recipe, DataSection, LoraSection, OptimSection, BatchSection, RunSection, Source)
        for name, f in s.model_fields.items()
    ]
    sections = {"data", "lora", "optim", "batch", "run"}
    assert [(s.__name__, name) for s, name, f in fields if not f.description and name not in sections] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_the_guide_speaks_of_every_verb_and_every_exit_code() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    told = set(re.findall(r"peftune (\w+)", guide)) | set(re.findall(r"launch/(\w+)\.sh", guide))
    assert verbs <= told
    assert [code for code in "01234" if f"{code} " not in guide.split("## Exit codes")[1]] == []


def test_the_changelog_has_the_version() -> None:
    assert f"## {peftune.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
