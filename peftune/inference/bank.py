"""One base in memory and any number of adapters on it, each a few megabytes beside it.

    bank = AdapterBank("builtin:small")
    bank.add("docs", "adapters/docs")
    bank.add("code", "adapters/code")
    texts = bank.generate(["The "] * 3, settings, adapters=["docs", "code", None])     # one batch

The base's tensors are never written to: adding, using and removing adapters leaves its logits as they were, to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftune.adapters.directory import Adapter, check_fits
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, refuse_biased_head
from peftune.adapters.provenance import check_base
from peftune.data.tokens.encode import end_of_text_id
from peftune.errors import UserError
from peftune.inference.generate import Generation, context_ids
from peftune.inference.settings import GenerationSettings
from peftune.model.base import open_base
from peftune.model.decode.batch import DecodeBatch, ModelVariant
from peftune.model.decode.build import Plan, build
from peftune.model.decode.lora_slots import LoraWeights, ModulePath, low_rank
from peftune.model.load import DTYPES

RESERVED = ("base", "auto")  # no adapter, and the likeliest one


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter in a bank. `rank` is its largest; `own_weights` where it is more than low-rank (DoRA, PiSSA, …)."""

    name: str
    directory: Path
    provenance: dict[str, Any] | None
    rank: int
    function: ModelVariant
    own_weights: bool


class AdapterBank:
    """A GPT-2 base, loaded once, and its adapters by name.

    `base` is a hub name, a directory or builtin:small; `precision` fp32, bf16 or fp16. Methods may be called from
    several threads; an adapter that is removed while texts are written with it stays in memory until they end.
    Raises UserError for a base that cannot be used.
    """

    def __init__(self, base: str, precision: str = "fp32", device: str | None = None) -> None:
        if precision not in DTYPES:
            raise UserError(f"precision is {precision}, expected one of {', '.join(DTYPES)}")
        self.base = base
        self.opened = open_base(base)
        self.config, self.tokenizer = self.opened.config, self.opened.tokenizer
        self._weights = self.opened.weights
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.plan = Plan(self.config, DTYPES[precision], place)
        self._base = ModelVariant(build(self.plan, self._weights.tensor, self._weights.tied))
        self._loaded: dict[str, Loaded] = {}
        self._in_use: str | None = None
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are here, in the order of their loading."""
        return tuple(self._loaded)

    @property
    def end(self) -> int:
        """The id of `<|endoftext|>`."""
        return end_of_text_id(self.tokenizer)

    def add(self, name: str, directory: Path | str) -> Loaded:
        """Read an adapter from disk under `name`.

        Raises UserError for a name that is taken, empty or reserved, for an adapter that is broken, and for one that
        was trained on another base.
        """
        if name in RESERVED or not name:
            raise UserError(f"adapter name {name!r}: {' and '.join(RESERVED)} mean something else; choose another name")
        directory = Path(directory)
        with self._lock:  # PEFT's own construction is not made for several threads
            if name in self._loaded:
                raise UserError(f"adapter {name}: there is one of this name already ({self._loaded[name].directory})")
            check_base(directory, self.opened)
            adapter, layout = check_fits(directory, self.config)
            refuse_biased_head(layout, str(directory))
            self._loaded[name] = self._load(name, adapter, layout)
            return self._loaded[name]

    def remove(self, name: str) -> None:
        """Forget an adapter; UserError where none has this name."""
        with self._lock:
            self.get(name)
            del self._loaded[name]
            if self._in_use == name:
                self._in_use = None

    def use(self, name: str | None) -> None:
        """Which adapter `generate` and `logits` take where they are told none; None (or "base") is the base alone."""
        self._in_use = None if name in (None, "base") else self.get(name).name

    def get(self, name: str) -> Loaded:
        """The adapter of this name; UserError where there is none: the base never stands in for it."""
        found = self._loaded.get(name)
        if found is None:
            raise UserError(f"no adapter is called {name!r}; known: {', '.join([*self._loaded, 'base'])}")
        return found

    def function(self, name: str | None) -> ModelVariant:
        """What a row with this adapter computes; None is the base alone."""
        return self._base if name is None else self.get(name).function

    def encode(self, prompt: str) -> list[int]:
        """What the model reads for a prompt: the context `<|endoftext|>`, then the prompt as plain text."""
        return context_ids(self.tokenizer, prompt)

    def logits(self, ids: torch.Tensor, adapters: str | Sequence[str | None] | None = ()) -> torch.Tensor:
        """Logits (R, T, V), float32, of texts `ids` (R, T) int64; `adapters` as in `generate`."""
        functions = [self.function(name) for name in self.one_each(len(ids), adapters)]
        batch = DecodeBatch(self.plan, len(ids), remember=False)
        hidden = batch.prefill(functions, range(len(ids)), ids.to(self.plan.device), 0)
        return torch.stack([batch.logits([f] * len(h), h) for f, h in zip(functions, hidden, strict=True)])

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        adapters: str | Sequence[str | None] | None = (),
        on_text: Callable[[int, str], None] | None = None,
        slots: int = 8,
    ) -> list[Generation]:
        """Continue every prompt, up to `slots` at a time in one batch; each gets the text that it would get alone.

        `adapters` is one name for all (None: the base), a sequence of one for each prompt, or () for the one in use.
        `on_text(i, piece)` is called with prompt i's text as it comes. Everything else as `generate.generate` has it.
        """
        from peftune.inference.writing import write

        names = self.one_each(len(prompts), adapters)
        return write(self, prompts, settings or GenerationSettings(), names, on_text, slots)

    def one_each(self, count: int, adapters: str | Sequence[str | None] | None) -> list[str | None]:
        """A name for each of `count` rows, out of what callers may give; "base" becomes None."""
        if adapters is None or isinstance(adapters, str):
            adapters = [adapters] * count
        elif not adapters:
            adapters = [self._in_use] * count
        if len(adapters) != count:
            raise UserError(f"{len(adapters)} adapters for {count} prompts; expected one for each")
        return [None if name == "base" else name for name in adapters]

    def _load(self, name: str, adapter: Adapter, layout: AdapterLayout) -> Loaded:
        rank = max((target.rank for target in layout.targets.values()), default=0)
        low = _low_rank(layout, self.plan.device)
        if low is not None:
            function = ModelVariant(self._base.model, low)
        else:
            folded = MergedTensors(self._weights, layout)
            shared, changed = self._base.model, folded.changed()
            function = ModelVariant(build(self.plan, folded.tensor, folded.tied, shared, changed))
        return Loaded(name, adapter.directory, adapter.provenance, rank, function, low is None)


def _low_rank(layout: AdapterLayout, device: torch.device) -> LoraWeights | None:
    """The adapter as factors beside the base, where it is no more than that."""
    plain = all(target.kind == "conv1d" and not target.pissa for target in layout.targets.values())
    if not plain or layout.replaced or layout.dora or layout.lora_bias or not layout.targets:
        return None
    parts: dict[ModulePath, tuple[torch.Tensor, torch.Tensor]] = {}
    scales: dict[ModulePath, float] = {}
    for target in layout.targets.values():
        _, _, block, module = target.name.split(".", 3)
        at = int(block), module
        parts[at] = target.parts["lora_A.weight"].to(device), target.parts["lora_B.weight"].to(device)
        scales[at] = target.scale
    return low_rank(parts, scales)
