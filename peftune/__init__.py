"""peftune: fine-tune GPT-2 with LoRA adapters, and trust the numbers that it prints.

    import peftune

    recipe = peftune.load_recipe("poems.yaml", ["run.out=adapters/poems"])
    peftune.train(recipe)
    peftune.evaluate(recipe.base, {"poems": "held-out.txt"}, {"poems": "adapters/poems"})
    peftune.generate("The sea", adapter="adapters/poems")
    peftune.merge("adapters/poems", "models/poems")

Names are imported when they are first used, so that `import peftune` costs nothing. docs/api.md has an example of each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftune.version import __version__ as __version__

if TYPE_CHECKING:
    from peftune.adapters.merge.merge import merge as merge
    from peftune.config.fleet import load_recipes as load_recipes
    from peftune.config.recipe import Recipe as Recipe
    from peftune.config.recipe import load_recipe as load_recipe
    from peftune.errors import PeftuneError as PeftuneError
    from peftune.errors import UserError as UserError
    from peftune.inference.bank import AdapterBank as AdapterBank
    from peftune.inference.generate import generate as generate
    from peftune.inference.perplexity import evaluate as evaluate
    from peftune.inference.settings import GenerationSettings as GenerationSettings
    from peftune.training.fleet.train_fleet import train_fleet as train_fleet
    from peftune.training.metrics import read_metrics as read_metrics
    from peftune.training.planning.plan import plan as plan
    from peftune.training.planning.summary import summarize_data as summarize_data
    from peftune.training.run import train as train

_HOMES = {
    "AdapterBank": "inference.bank",
    "GenerationSettings": "inference.settings",
    "PeftuneError": "errors",
    "Recipe": "config.recipe",
    "UserError": "errors",
    "evaluate": "inference.perplexity",
    "generate": "inference.generate",
    "load_recipe": "config.recipe",
    "load_recipes": "config.fleet",
    "merge": "adapters.merge.merge",
    "plan": "training.planning.plan",
    "read_metrics": "training.metrics",
    "summarize_data": "training.planning.summary",
    "train": "training.run",
    "train_fleet": "training.fleet.train_fleet",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftune' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"peftune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
