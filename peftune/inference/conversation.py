"""Which adapters were trained on conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftune.inference.bank import AdapterBank


def speaks(bank: AdapterBank, name: str) -> bool:
    """Whether an adapter was trained on conversations, as far as its provenance says.

    `chat` is recorded since that key exists; older adapters show it where the recipe names a column of messages.
    """
    provenance = bank.get(name).provenance or {}
    if isinstance(provenance.get("chat"), bool):
        return bool(provenance["chat"])
    recipe = provenance.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    sources = data.get("train") if isinstance(data, dict) else None
    listed = sources if isinstance(sources, list) else []
    return bool(listed) and all(isinstance(one, dict) and bool(one.get("messages")) for one in listed)
