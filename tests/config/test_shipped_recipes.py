"""Every file of settings that the repository ships can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftune.config.fleet import load_recipes
from peftune.config.recipe import load_recipe, recipe_from

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_the_promised_recipes_are_there() -> None:
    assert {path.name for path in RECIPES} >= {
        "cpu.yaml",
        "fleet.yaml",
        "gpt2-xl-24gb.yaml",
        "poems.yaml",
        "support.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_writes_to_directories_of_its_own(path: Path) -> None:
    others = {recipe.run.out for other in RECIPES if other != path for recipe in load_recipes([other])}
    assert others.isdisjoint(recipe.run.out for recipe in load_recipes([path]))


def test_the_fleet_recipe_has_one_text_at_two_ranks_and_another_text() -> None:
    first, second, third = load_recipes([ROOT / "launch" / "recipes" / "fleet.yaml"])
    assert first.base == "builtin:small" and first.data == second.data != third.data
    assert (first.lora.rank, second.lora.rank) == (16, 4) and first.lora == third.lora
    assert list(third.data.validation_sources()) == ["unicode"]


def test_the_cpu_recipe_needs_no_network() -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / "cpu.yaml")
    assert recipe.base == "builtin:small"
    assert [source.path for source in recipe.data.train] == ["builtin:docs/train"]


def test_the_support_recipe_scores_answers_alone() -> None:
    (source,) = load_recipe(ROOT / "launch" / "recipes" / "support.yaml").data.train
    assert (source.prompt, source.completion, source.text) == ("ticket", "answer", None)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_on_the_built_in_base(path: Path, tmp_path: Path) -> None:
    """As it is but for the base, the user's file, the length of the run and where it goes."""
    from peftune.training.export.adapter import Delivery
    from peftune.training.fleet.train_fleet import train_fleet
    from peftune.training.run import train

    made = []
    for number, recipe in enumerate(load_recipes([path])):
        values, source = recipe.model_dump(mode="json"), recipe.data.train[0]
        columns = [column for column in (source.prompt, source.completion) if column] or ["text"]
        rows = [{column: f"{column} number {row} of the file" for column in columns} for row in range(40)]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        named = dict(zip(("prompt", "completion"), columns, strict=False)) if source.prompt else {}
        fraction = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.2
        values["data"] |= {"train": {"path": str(data), **named}, "validation": fraction, "block_size": 64}
        short = ["base=builtin:small", "optim.steps=2", f"run.out={tmp_path / str(number)}", "batch.global_size=4"]
        micro = [] if recipe.batch.micro_size == "auto" else ["batch.micro_size=2"]
        made.append(recipe_from(values, short + micro))
    outcomes = train_fleet(made) if len(made) > 1 else [train(made[0])]
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Delivery) and outcome.step == 2
        assert (tmp_path / str(number) / "adapter_model.safetensors").is_file()
