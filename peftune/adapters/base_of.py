"""Which base adapters belong to: the one that they name, whether it is one for all, and which GPT-2 their shapes imply.

PEFT decides ranks and scales by the names of modules, so a base of the right shape is needed even to read an adapter;
its width, blocks and vocabulary are found in the shapes of the adapter's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from peftune.adapters.directory import Adapter, read_config
from peftune.adapters.layout import AdapterLayout, layout_of, module_of, plain_name
from peftune.adapters.provenance import FINGERPRINTS, check_base, read_provenance, recorded_base
from peftune.errors import UserError
from peftune.model.base import open_base

_KNOWN = re.compile(r"(?:transformer\.)?(?:h\.(?P<block>\d+)\.(?P<inside>.+)|(?P<outside>wte|wpe|ln_f|lm_head))")
_THREE, _WIDTH, _INNER, _TOKENS, _PLACES = "three times n_embd", "n_embd", "n_inner", "vocab_size", "n_positions"
_SIDES = {  # module: what the sides of its matrix are, out and in; of an embedding rows and columns
    "attn.c_attn": (_THREE, _WIDTH), "attn.c_proj": (_WIDTH, _WIDTH), "mlp.c_fc": (_INNER, _WIDTH),
    "mlp.c_proj": (_WIDTH, _INNER), "wte": (_TOKENS, _WIDTH), "wpe": (_PLACES, _WIDTH), "lm_head": (_TOKENS, _WIDTH),
}  # fmt: skip
_UNNAMED = "does not say which base it was trained on; pass the base"


def base_of(*adapter_dirs: Path) -> str:
    """The name of the base that all of these adapters were trained on.

    Raises UserError where one does not say, where they name several, and where there is no adapter.
    """
    names = []
    for directory in adapter_dirs:
        name = recorded_base(read_config(directory), read_provenance(directory))
        if name is None:
            raise UserError(f"adapter {directory}: {_UNNAMED}")
        names.append(name)
    if len(set(names)) != 1:
        found = f"the adapters name {', '.join(sorted(set(names)))}" if names else "no base and no adapter"
        raise UserError(f"{found}; pass the base: a hub name, a directory or builtin:small")
    return names[0]


def shared_base(adapters: Sequence[Adapter], base: str | None) -> dict[str, str]:
    """What peftune.json says about the base of something made from all of these: its name, and fingerprints if known.

    With `base` it is that one, and adapters with fingerprints must be of it. Raises UserError where the adapters are
    of several bases, or where nothing shows that they are of one.
    """
    if base is not None:
        found = open_base(base)
        for adapter in adapters:
            check_base(adapter.directory, found)
        return found.identity()
    for second in adapters[1:]:
        if reason := base_mismatch(adapters[0], second):
            raise UserError(reason)
    fingerprints = {key: value for adapter in adapters for key, value in _fingerprints(adapter).items()}
    name = next((adapter.base for adapter in adapters if _fingerprints(adapter)), adapters[0].base)
    if name is None:
        raise UserError(f"adapter {adapters[0].directory}: {_UNNAMED}")
    return {"base": name, **fingerprints}


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
    recorded = adapter.provenance or {}
    return {key: recorded[key] for key in FINGERPRINTS if isinstance(recorded.get(key), str)}


def read_layout(adapter: Adapter, base: GPT2Config | None = None) -> AdapterLayout:
    """The adapter sorted by modules, for `base` or for the architecture that its tensors imply; UserError as there."""
    config = base if base is not None else infer_config([adapter])
    return layout_of(adapter.config, adapter.tensors, config, str(adapter.directory))


def infer_config(adapters: Iterable[Adapter]) -> GPT2Config:
    """The smallest GPT-2 that all of these adapters fit; what they do not imply is as in `gpt2`.

    Raises UserError for modules that no GPT-2 has, and for adapters of unlike widths.
    """
    found: dict[str, tuple[int, Adapter]] = {}
    blocks = 1
    for adapter in adapters:
        for block, what, size in _facts(adapter):
            blocks = max(blocks, block + 1)
            known, other = found.setdefault(what, (size, adapter)) if what else (size, adapter)
            if known != size:
                raise UserError(
                    f"adapter {adapter.directory}: is made for a base with {what} {size}, {other.directory} for one "
                    f"with {known}; they do not fit one base"
                )
    sizes: dict[str, Any] = {what: size for what, (size, _) in found.items()}
    if _WIDTH not in sizes:
        names = " and ".join(sorted({str(adapter.directory) for adapter in adapters}))
        raise UserError(f"adapter {names}: does not tell the width of its base; pass the base")
    return GPT2Config(n_layer=blocks, n_head=1, **sizes)


def _facts(adapter: Adapter) -> Iterator[tuple[int, str, int]]:
    """(block, name of a size, size) from each tensor; the name is empty where a tensor implies none."""
    for name, tensor in adapter.tensors.items():
        plain = plain_name(name).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module = module_of(plain)
        known = _KNOWN.fullmatch(module)
        if known is None:
            raise UserError(
                f"adapter {adapter.directory}: adapts {module}, which no GPT-2 has; peftune knows GPT-2 only"
            )
        block, inside = int(known["block"] or 0), known["inside"] or known["outside"]
        yield block, "", 0
        yield from (
            (block, what, size) for what, size in _sizes(inside, plain.removeprefix(f"{module}."), tensor.shape)
        )


def _sizes(inside: str, part: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    if part == "weight" and len(shape) == 1:  # a norm in modules_to_save
        return [(_WIDTH, shape[0])]
    if inside not in _SIDES or len(shape) != 2:
        return []
    rows, columns = _SIDES[inside]
    if part == "weight":
        return [(rows, shape[0]), (columns, shape[1])] if inside in ("wte", "wpe", "lm_head") else []
    sides = {
        "lora_A.weight": (columns, shape[1]), "lora_B.weight": (rows, shape[0]),
        "lora_embedding_A": (rows, shape[1]), "lora_embedding_B": (columns, shape[0]),
    }  # fmt: skip
    what, size = sides.get(part, (_THREE, 0))
    return [] if what == _THREE else [(what, size)]
