"""Every file of settings that the repository ships can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from peftune.config.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_the_promised_recipes_are_there() -> None:
    assert {path.name for path in RECIPES} >= {"cpu.yaml", "gpt2-xl-24gb.yaml", "poems.yaml", "support.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_writes_to_a_directory_of_its_own(path: Path) -> None:
    recipe = load_recipe(path)
    others = {load_recipe(other).run.out for other in RECIPES if other != path}
    assert recipe.run.out not in others


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
    from peftune.training.run import train

    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = load_recipe(path).data.train[0]
    columns = [column for column in (source.prompt, source.completion) if column] or ["text"]
    rows = [{column: f"{column} number {row} of the file" for column in columns} for row in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_on = (
        {"path": str(data), **dict(zip(("prompt", "completion"), columns, strict=False))}
        if source.prompt
        else str(data)
    )
    validation = written["data"].get("validation", 0.05)
    written["data"] |= {
        "train": train_on,
        "validation": validation if isinstance(validation, float) else 0.2,
        "block_size": 64,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    short = ["base=builtin:small", "optim.steps=2", f"run.out={tmp_path / 'adapter'}", "batch.global_size=4"]
    micro = ["batch.micro_size=2"] if "micro_size" in written.get("batch", {}) else []
    delivery = train(load_recipe(tmp_path / "recipe.yaml", short + micro))
    assert delivery.step == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
