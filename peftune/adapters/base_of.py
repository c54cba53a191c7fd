"""Which base adapters belong to: the one that they name, whether it is one for all, and which GPT-2 their shapes imply.

PEFT decides ranks and scales by the names of modules, so a base of the right shape is needed even to read an adapter;
its width, blocks and vocabulary are found in the shapes of the adapter's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from peftune.adapters.directory import Adapter, read_adapter, read_settings
from peftune.adapters.layout import AdapterLayout, base_name, layout_of, module_of
from peftune.adapters.provenance import (
    FINGERPRINTS,
    FROM_ADAPTER,
    directory_of,
    place_of_base,
    recorded,
    recorded_dict,
)
from peftune.adapters.token_rows import named_tokens
from peftune.console import Console
from peftune.errors import BaseNotFound, UserError
from peftune.model.base import Base

_KNOWN = re.compile(r"(?:transformer\.)?(?:h\.(?P<block>\d+)\..+|wte|wpe|ln_f|lm_head)")
_IMPLIED = [  # the tensors whose shape shows a size of the base, by the dimension that does
    (re.compile(rf"\b({pattern})$"), dimension, size)
    for pattern, dimension, size in (
        (r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|lm_head)\.lora_A\.weight", 1, "n_embd"),
        (r"(attn|mlp)\.c_proj\.lora_B\.weight|(wte|wpe)\.lora_embedding_B|ln_\w+\.weight", 0, "n_embd"),
        (r"mlp\.c_fc\.lora_B\.weight", 0, "n_inner"),
        (r"mlp\.c_proj\.lora_A\.weight", 1, "n_inner"),
        (r"lm_head\.lora_B\.weight|(lm_head|wte)\.weight", 0, "vocab_size"),
        (r"wte\.lora_embedding_A", 1, "vocab_size"),
        (r"wpe\.weight", 0, "n_positions"),
        (r"wpe\.lora_embedding_A", 1, "n_positions"),
        (r"(lm_head|wte|wpe)\.(weight|token_adapter\.trainable_tokens_delta)", 1, "n_embd"),
    )
]
_UNNAMED = "does not say which base it was trained on; pass the base"


def base_of(*adapter_dirs: Path) -> str:
    """What the base that all of these adapters were trained on can be opened by, wherever this is called from.

    Raises UserError where one does not say, where they name several, where there is no adapter, and where the directory
    that they name is found neither from here nor from the adapter.
    """
    settings = {path: read_settings(path) for path in adapter_dirs}
    named = {place_of_base(path, *both) or "": path for path, both in settings.items()}
    if "" in named:
        raise UserError(f"adapter {named['']}: {_UNNAMED}")
    for name, path in named.items():
        way = recorded(settings[path][1], FROM_ADAPTER)
        if way is not None and directory_of(name) is None:
            raise BaseNotFound(
                f"adapter {path}: its base {name} is found neither from here nor from the adapter ({way}); pass the "
                "directory in which it lies now"
            )
    if len(named) != 1:
        found = f"the adapters name {', '.join(sorted(named))}" if named else "no base and no adapter"
        raise UserError(f"{found}; pass the base: a hub name, a directory or builtin:small")
    return next(iter(named))


def shared_base(adapters: Sequence[Adapter], base: Base | None) -> dict[str, str]:
    """What peftune.json says about the base of something made from all of these: its name, and fingerprints if known.

    With `base` it is that one, and adapters with fingerprints must be of it. Raises UserError where the adapters are
    of several bases, or where nothing shows that they are of one.
    """
    if base is not None:
        for adapter in adapters:
            check_base(adapter, base)
        return base.identity()
    for second in adapters[1:]:
        if reason := base_mismatch(adapters[0], second):
            raise UserError(reason)
    fingerprints = {key: value for adapter in adapters for key, value in _fingerprints(adapter).items()}
    name = next((adapter.base for adapter in adapters if _fingerprints(adapter)), adapters[0].base)
    if name is None:
        raise UserError(f"adapter {adapters[0].directory}: {_UNNAMED}")
    return {"base": name, **fingerprints}


def check_base(adapter: Adapter, base: Base) -> None:
    """Refuse an adapter on another base or tokenizer than it was trained with.

    Adapters without fingerprints (plain PEFT) pass; their shapes are checked on loading. Raises UserError. Where an
    older release trained it on texts that began otherwise, that is said.
    """
    trained = recorded(adapter.provenance, "base") or "its base"
    for key, expected in _fingerprints(adapter).items():
        found: str = getattr(base, key.removeprefix("base_"))
        if found != expected:
            what = FINGERPRINTS[key]
            raise UserError(
                f"adapter {adapter.directory} was trained on {trained} ({what} {expected[:12]}), but {base.directory} "
                f"has other {what} ({found[:12]}); pass the base that it was trained on"
            )
    read, tokenizer = recorded_dict(recorded(adapter.provenance, "recipe"), "data"), base.tokenizer
    if read and "special_tokens" not in read and tokenizer.bos_token not in (None, tokenizer.eos_token):
        _say_once(  # recipes have that key since texts begin with the tokenizer's own first token
            f"adapter {adapter.directory}: an older release trained it on texts that began with {tokenizer.eos_token}; "
            f"now they begin with {tokenizer.bos_token}, so it is asked otherwise than it was trained: train it again"
        )


@cache
def _say_once(text: str) -> None:
    """A command may read an adapter more than once."""
    Console().say(text)


def base_mismatch(first: Adapter, second: Adapter) -> str:
    """Why two adapters cannot be taken for adapters of one base; empty where they can."""
    ours, theirs = _fingerprints(first), _fingerprints(second)
    names = first.base, second.base
    for key, what in FINGERPRINTS.items():
        if key in ours and key in theirs and ours[key] != theirs[key]:
            return (
                f"adapter {first.directory} was trained on {names[0]} ({what} {ours[key][:12]}), {second.directory} on "
                f"{names[1]} ({what} {theirs[key][:12]}); an update means nothing on another base"
            )
    if "base_fingerprint" in ours.keys() & theirs.keys() or (None not in names and names[0] == names[1]):
        return ""
    unknown = second if "base_fingerprint" not in theirs else first
    return (
        f"adapter {first.directory} names the base {names[0]}, {second.directory} {names[1]}, and {unknown.directory} "
        "holds no fingerprint that would tell whether these are the same; pass the base if they are"
    )


def _fingerprints(adapter: Adapter) -> dict[str, str]:
    known = adapter.provenance or {}
    return {key: known[key] for key in FINGERPRINTS if isinstance(known.get(key), str)}


def read_layout(adapter: Adapter, base: GPT2Config | None = None) -> AdapterLayout:
    """The adapter sorted by modules, for `base` or for the architecture that its tensors imply; UserError as there."""
    config = base if base is not None else infer_config([adapter])
    return layout_of(adapter.config, adapter.tensors, config, str(adapter.directory))


def read_for(directory: Path, base: Base) -> tuple[Adapter, AdapterLayout]:
    """An adapter, and what it changes in its base; UserError where it is of another one, or is broken."""
    adapter = read_adapter(directory)
    check_base(adapter, base)
    return adapter, read_layout(adapter, base.config)


def infer_config(adapters: Sequence[Adapter]) -> GPT2Config:
    """The smallest GPT-2 that all of these adapters fit; what they do not imply is as in `gpt2`.

    Raises UserError for modules that no GPT-2 has, and for adapters of unlike widths.
    """
    found: dict[str, tuple[int, Adapter]] = {}
    blocks = 1
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            plain = base_name(name)
            module = module_of(plain)
            if (known := _KNOWN.fullmatch(module)) is None:
                where = f"adapter {adapter.directory}"
                raise UserError(f"{where}: adapts {module}, which no GPT-2 has; peftune knows GPT-2 only")
            blocks = max(blocks, int(known["block"] or 0) + 1)
            for pattern, dimension, what in _IMPLIED:
                if dimension < tensor.ndim and pattern.search(plain):
                    size, other = found.setdefault(what, (tensor.shape[dimension], adapter))
                    if size != tensor.shape[dimension]:
                        raise UserError(
                            f"adapter {adapter.directory}: is made for a base with {what} {tensor.shape[dimension]}, "
                            f"{other.directory} for one with {size}; they do not fit one base"
                        )
    if "n_embd" not in found:
        names = " and ".join(sorted({str(adapter.directory) for adapter in adapters}))
        raise UserError(f"adapter {names}: does not tell the width of its base; pass the base")
    named = [token for adapter in adapters for token in named_tokens(adapter.config)]
    if "vocab_size" not in found and named:
        found["vocab_size"] = max(GPT2Config().vocab_size, 1 + max(named)), adapters[0]
    sizes: dict[str, Any] = {what: size for what, (size, _) in found.items()}
    return GPT2Config(n_layer=blocks, n_head=1, **sizes)
