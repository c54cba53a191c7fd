"""The GPT-2 that an adapter was made for, as far as its tensors tell: for work that needs no weights of the base.

PEFT decides ranks and scales by the names of modules, so a base of the right shape is needed even to read an adapter;
its width, blocks and vocabulary stand in the shapes of the adapter's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import GPT2Config

from peftune.adapters.directory import Adapter
from peftune.adapters.layout import AdapterLayout, layout_of, module_of, stripped
from peftune.errors import UserError

_KNOWN = re.compile(r"(?:transformer\.)?(?:h\.(?P<block>\d+)\.(?P<inside>.+)|(?P<outside>wte|wpe|ln_f|lm_head))")
_THREE, _WIDTH, _INNER, _TOKENS, _PLACES = "three times n_embd", "n_embd", "n_inner", "vocab_size", "n_positions"
_SIDES = {  # module: what the sides of its matrix are, out and in; of an embedding rows and columns
    "attn.c_attn": (_THREE, _WIDTH), "attn.c_proj": (_WIDTH, _WIDTH), "mlp.c_fc": (_INNER, _WIDTH),
    "mlp.c_proj": (_WIDTH, _INNER), "wte": (_TOKENS, _WIDTH), "wpe": (_PLACES, _WIDTH), "lm_head": (_TOKENS, _WIDTH),
}  # fmt: skip


def read_layout(adapter: Adapter, base: GPT2Config | None = None) -> AdapterLayout:
    """The adapter sorted by modules, for `base` or for the architecture that its tensors imply; UserError as there."""
    config = base if base is not None else infer_config([adapter])
    return layout_of(adapter.config, adapter.tensors, config, str(adapter.directory))


def infer_config(adapters: Iterable[Adapter]) -> GPT2Config:
    """The smallest GPT-2 that all of these adapters fit; what they do not tell is as in `gpt2`.

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
        raise UserError(f"adapter {names}: does not tell the width of its base; pass --base")
    return GPT2Config(n_layer=blocks, n_head=1, **sizes)


def _facts(adapter: Adapter) -> Iterator[tuple[int, str, int]]:
    """(block, name of a size, size) from each tensor; the name is empty where a tensor tells nothing."""
    for name, tensor in adapter.tensors.items():
        plain = stripped(name).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
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
    if part == "weight" and len(shape) == 1:  # a norm that was trained whole
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
