"""Every file of settings that the repository ships can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from peftune.config import load_recipe

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_configuration_is_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 1
    assert "deepspeed_config" not in yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_configuration_leaves_to_the_recipe_what_the_recipe_says(stage: int) -> None:
    config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == stage
    assert not {"optimizer", "scheduler"} & config.keys()
    sizes = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    assert {config[key] for key in sizes} == {"auto"}
