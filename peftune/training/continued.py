"""Going on from an adapter (`run.init`): its values, what of a recipe it decides, and AdamW's moments if asked for.

What PEFT's `PeftModel.from_pretrained(…, is_trainable=True)` starts from, on the base that the adapter was trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import GPT2LMHeadModel

from peftune.adapters.base_of import read_for
from peftune.adapters.directory import Adapter
from peftune.adapters.layout import (
    AdapterLayout,
    block_of,
    changes_base,
    module_of,
    plain_name,
    suffix_in_block,
)
from peftune.adapters.provenance import INIT, recorded, recorded_list
from peftune.config.recipe import LoraSection, Recipe, recipe_from
from peftune.errors import UserError
from peftune.model.base import Base
from peftune.model.fingerprint import bytes_of
from peftune.model.load import rows_of
from peftune.model.lora import ALL, ATTENTION, Adapted, adapted_modules, quiet_peft, skeleton
from peftune.model.train.attention_parts import QUERY_VALUE, stacked_alpha, untrained_mask
from peftune.model.weights import HEAD, WTE
from peftune.training import checkpoint
from peftune.training.optimizer import MOMENTS, Tensors

_BY_MODULE = ("rank_pattern", "alpha_pattern", "lora_bias")  # of PEFT's settings: what no recipe says
_PRESETS = {frozenset(ALL): "all", frozenset(ATTENTION): "attention"}


@dataclass(frozen=True)
class Continued:
    """An adapter that a run goes on from; `settings` are PEFT's where no recipe can say them, else None."""

    adapter: Adapter
    settings: LoraConfig | None
    moments: Tensors = field(default_factory=dict)
    """AdamW's by the names of `Adapted.trainable`; empty where they begin anew."""

    @property
    def updates(self) -> int:
        """AdamW's steps before this run."""
        return int(next((value for name, value in self.moments.items() if name.endswith(f"/{MOMENTS[0]}")), 0))

    def fingerprints(self) -> dict[str, str]:
        """Of all that the run takes over."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.moments.items()):
            digest.update(name.encode() + bytes_of(tensor))
        moments = {"moments of init": digest.hexdigest()} if self.moments else {}
        return {"init": self.adapter.fingerprint, **moments}

    def chain(self) -> list[dict[str, Any]]:
        """What peftune.json records: this adapter, then those that it went on from itself, the nearest first."""
        known, kept = self.adapter.provenance or {}, ("step", "tokens", "data_fingerprints")
        own = self.adapter.origin() | {key: known[key] for key in kept if key in known}
        return [own, *recorded_list(known, INIT)]

    def notes(self) -> Iterator[str]:
        """What a person should know before the first step."""
        where, moments = self.adapter.directory, f"AdamW's moments of {self.updates:,} steps" if self.moments else ""
        yield f"going on from {where} ({self.adapter.fingerprint[:12]}), {moments or 'AdamW begins anew'}"
        if recorded(self.adapter.provenance, "base_fingerprint") is None:
            yield f"{where} records no fingerprint of its base; that it was trained on this one could not be checked"

    def first_values(self, adapted: Adapted) -> Tensors:
        """Its tensors by the names of the trainable parameters, float32 on the CPU."""
        stored = {plain_name(name): tensor for name, tensor in self.adapter.tensors.items()}
        return {name: stored[key].float() for key, name in _names(adapted).items()}


def _names(adapted: Adapted) -> dict[str, str]:
    """Names of trainable parameters by those that PEFT stores them under; a sharded model's are not read."""
    names = list(adapted.trainable())
    numbers: dict[str, Any] = {name: torch.tensor(number, device="cpu") for number, name in enumerate(names)}
    with quiet_peft():
        stored = get_peft_model_state_dict(adapted.model, state_dict=numbers, save_embedding_layers=False)
    return {plain_name(key): names[int(number)] for key, number in stored.items()}


def continued_from(recipe: Recipe, base: Base) -> tuple[Recipe, Continued]:
    """The adapter of `run.init`, and the recipe with what it decides.

    UserError where it is not one of this base, where training it would not be what PEFT does, where the recipe says
    something else than it, and where its moments are asked for and not there.
    """
    where = Path(str(recipe.run.init))
    adapter, layout = read_for(where, base)
    if where.resolve() == Path(recipe.run.out).resolve():
        raise UserError(f"run.out is run.init ({where}), which is not overwritten; give the new adapter another name")
    if reason := _reason_against(adapter, layout, base):
        raise UserError(f"run.init {where}: {reason}")
    lora = _resolved_section(recipe, adapter, layout, base)
    values = recipe.model_dump()
    values |= {"lora": lora.model_dump(), "data": values["data"] | {"new_tokens": _new_tokens(recipe, adapter, base)}}
    resolved = recipe_from(values, [], f"with what {where} decides")
    settings = None
    if any(adapter.config.get(key) for key in _BY_MODULE) or (layout.dora and layout.rslora):
        own = {"init_lora_weights": True, "inference_mode": False, "fan_in_fan_out": True, "lora_dropout": lora.dropout}
        settings = LoraConfig(**{**layout.settings, **own})
    moments = _moments(adapter, base, resolved, settings) if recipe.run.init_optimizer else {}
    return resolved, Continued(adapter, settings, moments)


def _reason_against(adapter: Adapter, layout: AdapterLayout, base: Base) -> str:
    """Why it cannot be gone on from; empty where it can."""
    if changes_base(adapter.config):
        return (
            "it changes the base itself (PiSSA as PEFT stores it, or trained biases), and training would go on from "
            "another function; fold it in with peftune merge, and train on the merged model"
        )
    if layout.vocabulary != base.config.vocab_size and not layout.rows:
        return (
            f"it has {layout.vocabulary:,} tokens, the base has {base.config.vocab_size:,}; fold it in with peftune "
            "merge, and train on the merged model"
        )
    saved = adapter.config.get("modules_to_save") or []
    for name, tensor in layout.replaced.items():  # PEFT stores an embedding beside an adapter of it
        module, source = module_of(name), WTE if name == HEAD and base.weights.tied else name
        trained = any(module == own or module.endswith(f".{own}") for own in saved)
        if not trained and not torch.equal(base.weights.tensor(source).float(), tensor.float()):
            return f"it brings a {module} that is not the base's and not in modules_to_save; fold it in first"
    return ""


def _resolved_section(recipe: Recipe, adapter: Adapter, layout: AdapterLayout, base: Base) -> LoraSection:
    """The recipe's section `lora` with the adapter's values; UserError, with both, where it asks for others."""
    config, asked = adapter.config, recipe.lora
    parts = _adapts_parts(adapter, layout, base, asked.targets == "query-value")
    rank, alpha = config["r"], float(config["lora_alpha"])
    targets, layers = _targets_and_layers(layout, base)
    if parts:
        alpha = float(f"{alpha / stacked_alpha(1.0, QUERY_VALUE, layout.rslora):.12g}")
        rank, targets = rank // len(QUERY_VALUE), "query-value"
    variant = "dora" if layout.dora else "rslora" if layout.rslora else "lora"
    values = {"rank": rank, "alpha": alpha, "targets": targets, "variant": variant, "layers": layers}
    said, dropout = asked.model_fields_set, config.get("lora_dropout", 0.0)
    values |= {"modules_to_save": config.get("modules_to_save") or [], "dropout": dropout}
    found = asked.model_copy(update=values if "dropout" not in said else values | {"dropout": asked.dropout})
    differs = _differs(found, asked, base)
    problems = [f"lora.{key} is {getattr(asked, key)}, it has {values[key]}" for key in differs if key in said]
    if problems:
        raise UserError(
            f"run.init {adapter.directory}: {'; '.join(problems)}; leave that out of the recipe, or train a new adapter"
        )
    return found


def _differs(found: LoraSection, asked: LoraSection, base: Base) -> list[str]:
    """The keys in which two sections say another adapter; names of modules are compared by what they name."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(base.config)

    def adapted(targets: LoraSection, layers: list[int] | None) -> object:
        section = targets.model_copy(update={"layers": layers})
        return adapted_modules(model, section), targets.targets == "query-value"

    is_other = {
        "rank": asked.rank != found.rank,
        "alpha": not math.isclose(asked.alpha, found.alpha, rel_tol=1e-9),
        "targets": adapted(asked, None) != adapted(found, None),
        "variant": asked.variant != found.variant,
        "layers": adapted(found, asked.layers) != adapted(found, found.layers),
        "modules_to_save": set(asked.modules_to_save) != set(found.modules_to_save),
    }
    return [key for key, other in is_other.items() if other]


def _targets_and_layers(layout: AdapterLayout, base: Base) -> tuple[str | list[str], list[int] | None]:
    """What a recipe would say: a preset or names within a block, and the blocks if not all; else full names."""
    names = sorted(layout.targets)
    blocks = sorted({int(block_of(name)) for name in names if suffix_in_block(name)})
    inside = {suffix_in_block(name) for name in names if suffix_in_block(name)}
    outside = [name for name in names if not suffix_in_block(name)]
    if len(blocks) * len(inside) + len(outside) != len(names) or (
        outside and len(blocks) not in (0, base.config.n_layer)
    ):
        return names, None
    preset = _PRESETS.get(frozenset(inside)) if not outside else None
    return preset or [*sorted(inside), *outside], None if len(blocks) in (0, base.config.n_layer) else blocks


def _adapts_parts(adapter: Adapter, layout: AdapterLayout, base: Base, asked: bool) -> bool:
    """Whether queries and values alone are adapted: peftune.json says so, or the recipe; and B must be of that form."""
    says = recorded(adapter.provenance, "recipe", "lora", "targets") == "query-value"
    if not says and not asked:
        return False
    ranks = {target.rank for target in layout.targets.values()}
    fits = len(ranks) == 1 and not min(ranks) % 2 and all(name.endswith(".attn.c_attn") for name in layout.targets)
    if fits:
        mask = untrained_mask(QUERY_VALUE, min(ranks) // 2, base.config.n_embd)
        fits = not any(target.parts["lora_B.weight"][mask].any() for target in layout.targets.values())
    if says and not fits:
        raise UserError(
            f"run.init {adapter.directory}: peftune.json says that it adapts queries and values alone, but its B has "
            "other values than zero elsewhere; copy the adapter again"
        )
    return fits


def _new_tokens(recipe: Recipe, adapter: Adapter, base: Base) -> list[str]:
    """The tokens whose rows it trains; UserError where the recipe names others, or nothing tells which they are."""
    where, asked = f"run.init {adapter.directory}", recipe.data.new_tokens
    known = recorded(adapter.provenance, "recipe", "data", "new_tokens")
    if not isinstance(known, list) or not all(isinstance(token, str) for token in known):
        known = None
    if "new_tokens" in recipe.data.model_fields_set and known is not None and asked != known:
        raise UserError(f"{where}: data.new_tokens is {asked}, it has {known}; leave that out of the recipe")
    tokens = asked or known or []
    trained = adapter.config.get("trainable_token_indices") or {}
    found = {name: sorted(rows) for name, rows in trained.items()} if isinstance(trained, dict) else {"wte": trained}
    if not tokens and found:
        raise UserError(
            f"{where}: trains rows of {len(found['wte'])} tokens and does not say which tokens these are; if they "
            "are new to the base, name them as data.new_tokens, else fold it in with peftune merge and train on that"
        )
    rows = rows_of(base, tokens) if tokens else []
    if any(sorted(value) != rows for value in found.values()) or (tokens and not found):
        raise UserError(f"{where}: data.new_tokens {tokens} are rows {rows} of this base, it has {found or 'none'}")
    return tokens


def _moments(adapter: Adapter, base: Base, recipe: Recipe, settings: LoraConfig | None) -> Tensors:
    """AdamW's moments of the checkpoint that the adapter was delivered from; UserError where there is none such."""
    folder, step = adapter.directory / "checkpoints", recorded(adapter.provenance, "step")
    if not isinstance(step, int) or not (folder / f"step-{step}").is_dir():
        raise UserError(
            f"run.init_optimizer: {folder}: there is no checkpoint of the step that the adapter was delivered from; "
            "leave it out, and AdamW begins anew"
        )
    saved = checkpoint.read(folder / f"step-{step}")
    rows = rows_of(base, recipe.data.new_tokens) if recipe.data.new_tokens else []
    values = Continued(adapter, settings).first_values(skeleton(base.config, recipe.lora, rows, settings))
    same = saved.values.keys() == values.keys() and all(torch.equal(saved.values[n], v) for n, v in values.items())
    if not same or saved.moments.keys() != {f"{name}/{key}" for name in values for key in MOMENTS}:
        raise UserError(
            f"run.init_optimizer: {folder}/step-{step} does not hold this adapter with its moments (PiSSA and LoftQ "
            "are delivered in another form than they are trained in); leave it out, and AdamW begins anew"
        )
    return saved.moments
