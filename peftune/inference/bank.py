"""One base in memory and any number of adapters on it, each a few megabytes beside it.

    bank = AdapterBank("builtin:small")
    bank.add("docs", "adapters/docs")
    bank.add("code", "adapters/code")
    texts = bank.generate(["The "] * 3, settings, adapters=["docs", "code", None])     # one batch

The base's tensors are never written to: adding, using and removing adapters leaves its logits as they were, to the bit.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from peftune.adapters.attach import fit
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, refuse_biased_head
from peftune.adapters.provenance import chat_of, parses_special_tokens
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id
from peftune.device import choose_device, inference_precision
from peftune.errors import CheckFailed, UserError, refuse_bare_string
from peftune.inference.detokenize import decode_plain
from peftune.inference.engine import Engine
from peftune.inference.request import Generation, OnText, Request, RequestOutput, context_ids
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base
from peftune.model.decode.batch import DecodeBatch, ModelVariant
from peftune.model.decode.build import ModelSpec, build
from peftune.model.decode.lora_stack import LoraWeights, lora_weights
from peftune.model.load import dtype_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESERVED = ("base", "auto")  # no adapter, and the likeliest one
AdapterNames = str | Sequence[str | None] | None
"""One name for all rows (None: the base), a sequence of one for each row, or () for the one in use."""


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """What is known of an adapter that is loaded; `rank` is its largest."""

    name: str
    directory: Path
    provenance: dict[str, Any] | None
    rank: int

    @property
    def parses_special_tokens(self) -> bool:
        """Whether special tokens that a prompt spells out are tokens, as in its training."""
        return parses_special_tokens(self.provenance)

    @property
    def chat(self) -> str | None:
        """The template of its conversations, `plain` or `eos-turns`; None where it was not trained on any."""
        return chat_of(self.provenance)


Adapter = TypeVar("Adapter", bound=AdapterInfo)


@dataclass(frozen=True, eq=False)
class LoadedAdapter(AdapterInfo):
    """An adapter in a bank; `rank` is its largest. More than low-rank (DoRA, PiSSA, …) has its own weights.

    One with rows of single tokens has its own embedding and head, each of tokens x width values (154 MB for GPT-2 in
    fp32), and shares the blocks.
    """

    variant: ModelVariant
    tokenizer: PreTrainedTokenizerFast
    """The base's, or its own where it has rows for new tokens."""


class NamedAdapters(Generic[Adapter]):
    """A base and the adapters on it by name."""

    base: Base
    _loaded: dict[str, Adapter]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are here, in the order of their loading."""
        return tuple(self._loaded)

    def get(self, name: str) -> Adapter:
        """The adapter of this name; UserError where there is none: the base never stands in for it."""
        found = self._loaded.get(name)
        if found is None:
            raise UserError(f"no adapter is called {name!r}; known: {', '.join([*self._loaded, 'base'])}")
        return found

    def parses(self, name: str | None) -> bool:
        """Whether special tokens that a prompt for this adapter (None: the base) spells out are tokens."""
        return self.base.parses_special_tokens if name is None else self.get(name).parses_special_tokens

    def chat(self, name: str | None) -> str | None:
        """The template of the conversations that an adapter (None: the base) answers; None where it answers none."""
        return self.base.chat if name is None else self.get(name).chat


class AdapterBank(NamedAdapters[LoadedAdapter]):
    """A GPT-2 base, loaded once, and its adapters by name.

    `base` is a hub name, a directory or builtin:small, or a `Base`; `precision` fp32, bf16, fp16 or
    auto, which is bf16 on a GPU that has it, else fp32; `device` cpu, cuda or auto (None), a GPU where there is one.
    `begin` and `end` are the ids of the tokens that begin and end texts, for GPT-2 both `<|endoftext|>`. Methods may be
    called from several threads; an adapter that is removed while texts are generated with it stays in memory until they
    end. Raises UserError for a base, or a GPU, that cannot be used.
    """

    def __init__(self, base: str | Path | Base, precision: str = "auto", device: str | None = None) -> None:
        self.base = open_base(base)
        self.config, self.tokenizer = self.base.config, self.base.tokenizer
        self.begin, self.end = begin_of_text_id(self.tokenizer), end_of_text_id(self.tokenizer)
        used = choose_device(device or "auto")
        self.precision = inference_precision(precision, used)
        self.spec = ModelSpec(self.config, dtype_of(self.precision), used)
        self._base_variant = ModelVariant(build(self.spec, self.base.weights.tensor, self.base.weights.tied))
        self._loaded: dict[str, LoadedAdapter] = {}
        self._in_use: str | None = None
        self._lock = threading.RLock()

    def add(self, name: str, directory: Path | str, replace: bool = False, new_tokens: bool = True) -> LoadedAdapter:
        """Load an adapter from disk under `name`; without `new_tokens` one that knows more tokens is refused.

        With `replace` one that has this name already serves until the new one is read, and texts being generated end
        with it.

        Raises UserError for a name that is taken, empty or reserved, for an adapter that is broken, and for one that
        was trained on another base.
        """
        with self._lock:
            return self.put(self.read(name, directory, replace, new_tokens))

    def read(self, name: str, directory: Path | str, replace: bool, new_tokens: bool) -> LoadedAdapter:
        """What `add` loads, before anybody can ask for it."""
        if name in RESERVED or not name:
            raise UserError(f"adapter name {name!r}: {' and '.join(RESERVED)} mean something else; choose another name")
        directory = Path(directory)
        with self._lock:  # PEFT's own construction is not made for several threads
            if name in self._loaded and not replace:
                raise UserError(f"adapter {name}: there is one of this name already ({self._loaded[name].directory})")
            adapter, layout, tokenizer = fit(directory, self.base, new_tokens)
            refuse_biased_head(layout, str(directory))
            rank = max((target.rank for target in layout.targets.values()), default=0)
            lora, model = _plain_lora(layout, self.spec), self._base_variant.model
            if lora is None or layout.rows:  # factors stay beside the blocks where they can
                own = layout if lora is None else dataclasses.replace(layout, targets={})
                merged = MergedTensors(self.base.weights, own)
                model = build(self.spec, merged.tensor, merged.tied, model, merged.changed())
            variant = ModelVariant(model, lora)
            return LoadedAdapter(name, directory, adapter.provenance, rank, variant, tokenizer)

    def put(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """From now on its name means what was `read`."""
        with self._lock:
            self._loaded[adapter.name] = adapter
            return adapter

    def remove(self, name: str) -> None:
        """Unload an adapter; UserError where none has this name."""
        with self._lock:
            self.get(name)
            del self._loaded[name]
            if self._in_use == name:
                self._in_use = None

    def use(self, name: str | None) -> None:
        """Which adapter `generate` and `logits` take where none is named; None (or "base") is the base alone."""
        self._in_use = None if name in (None, "base") else self.get(name).name

    def variant(self, name: str | None) -> ModelVariant:
        """What a row with this adapter computes; None is the base alone."""
        return self._base_variant if name is None else self.get(name).variant

    def tokenizer_of(self, name: str | None) -> PreTrainedTokenizerFast:
        """The tokenizer of an adapter's texts; None is the base alone."""
        return self.tokenizer if name is None else self.get(name).tokenizer

    def encode(self, prompt: str, adapter: str | None = None) -> list[int]:
        """The token ids of a prompt for an adapter: the context token (begin of text), then the prompt."""
        return context_ids(self.tokenizer_of(adapter), prompt, self.parses(adapter))

    def logits(self, ids: torch.Tensor, adapters: AdapterNames = ()) -> torch.Tensor:
        """Logits (R, T, V), float32, of texts `ids` (R, T) int64; UserError where V is not the same for all."""
        variants = [self.variant(name) for name in self._one_each(len(ids), adapters)]
        if len({variant.model.vocabulary for variant in variants}) > 1:
            raise UserError("logits: the adapters know unequally many tokens; ask for them one after the other")
        batch = DecodeBatch(len(ids))
        hidden = batch.prefill(variants, range(len(ids)), ids.to(self.spec.device), 0)
        return torch.stack([batch.logits([v], h[None])[0] for v, h in zip(variants, hidden, strict=True)])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: GenerationSettings | None = None,
        adapters: AdapterNames = (),
        on_text: OnText | None = None,
        slots: int = 8,
    ) -> list[Generation]:
        """Continue every prompt, up to `slots` at a time in one batch; each gets the text that it would get alone
        (on a GPU but for near ties between two tokens: its kernels depend on the number of rows).

        With `num_return_sequences` n, the n texts of the first prompt come first (also for `on_text`), then those of
        the second; they sample with seed, seed + 1, ….

        **Context.** As in training, a document begins with `<|endoftext|>`, or with what begins texts of this base: its
        id stands before the prompt at position 0. The prompt is plain text (`<|endoftext|>` written in it is 13
        characters) unless the adapter was trained to parse special tokens; an empty prompt begins a new document.
        Instead of a text it may be the ids themselves, context token included.

        **Sliding window.** Whenever the model would see more than n_positions tokens (context token, prompt and what it
        has generated), it sees only the last n_positions - n_positions // 4 of them: the oldest quarter is dropped,
        positions restart at 0 and the cache is computed anew. A longer prompt is cut by the same rule.

        **Random numbers.** Every prompt has a generator of its own, seeded with `settings.seed` (None: a new seed
        each): its text does not depend on its neighbours, and equal prompts of a seeded call get equal texts.

        A repetition penalty also counts the context token, as in Transformers. Raises UserError for beams (see
        `generate.generate`) and unknown adapters, CheckFailed where the logits are not finite.
        """
        refuse_bare_string(prompts, "prompts")
        settings, names = settings or GenerationSettings(), self._one_each(len(prompts), adapters)
        each = settings.samples()
        prompts, names = [p for p in prompts for _ in each], [name for name in names for _ in each]
        engine = Engine(self, slots=min(slots, max(1, len(prompts))), queue=max(1, len(prompts)))
        outputs: list[list[RequestOutput]] = [[] for _ in prompts]

        def listen(index: int, output: RequestOutput) -> None:
            outputs[index].append(output)
            if output.text and on_text is not None:
                on_text(index, output.text)

        handles = []
        for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            ids = self.encode(prompt, name) if isinstance(prompt, str) else prompt
            request = Request(tuple(ids), name, each[index % len(each)], slide=True)
            handles.append(engine.submit(request, partial(listen, index)))
        while engine.step():
            pass
        results = []
        for prompt, name, handle, got in zip(prompts, names, handles, outputs, strict=True):
            reason = got[-1].finish_reason
            if reason == "error":
                raise CheckFailed(got[-1].error)
            assert reason is not None, "the engine ends every request"
            seed = handle.seed if settings.sampling_temperature > 0 else None
            text, ids = "".join(output.text for output in got), tuple(i for output in got for i in output.ids)
            prompt = prompt if isinstance(prompt, str) else decode_plain(self.tokenizer_of(name), prompt)
            results.append(Generation(prompt, text, ids, reason, len(handle.request.ids), seed))
        return results

    def _one_each(self, count: int, adapters: AdapterNames) -> list[str | None]:
        """A name for each of `count` rows; "base" becomes None."""
        if adapters is None or isinstance(adapters, str):
            adapters = [adapters] * count
        elif not adapters:
            adapters = [self._in_use] * count
        if len(adapters) != count:
            raise UserError(f"{len(adapters)} adapters for {count} prompts; expected one for each")
        return [None if name == "base" else name for name in adapters]


def _plain_lora(layout: AdapterLayout, spec: ModelSpec) -> LoraWeights | None:
    """The adapter as factors beside the base, where it is no more than that."""
    plain = all(target.kind == "conv1d" and not target.pissa for target in layout.targets.values())
    if not plain or layout.replaced or layout.dora or layout.lora_bias or not layout.targets:
        return None
    factors = {}
    for target in layout.targets.values():
        _, _, block, module = target.name.split(".", 3)
        a, b = (target.parts[f"lora_{side}.weight"].to(spec.device, torch.float32) for side in "AB")
        factors[int(block), module] = a, b, target.scale
    return lora_weights(factors, spec.activations)
