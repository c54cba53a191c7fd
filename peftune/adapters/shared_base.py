"""Whether adapters belong to one base: by fingerprints where peftune.json has them, else by the base's name."""

from __future__ import annotations

from collections.abc import Sequence

from peftune.adapters.directory import Adapter, named_base
from peftune.adapters.provenance import FINGERPRINTS, check_base
from peftune.errors import UserError
from peftune.model.base import open_base


def recorded_base(adapter: Adapter) -> str | None:
    """The name of the base that an adapter records, or None."""
    return named_base(adapter.config, adapter.provenance)


def shared_base(adapters: Sequence[Adapter], base: str | None) -> dict[str, str]:
    """What peftune.json says about the base of something made from all of these: its name, and fingerprints if known.

    With `base` it is that one, and adapters with fingerprints must be of it. Raises UserError where the adapters are
    of several bases, or where nothing tells that they are not.
    """
    if base is not None:
        found = open_base(base)
        for adapter in adapters:
            check_base(adapter.directory, found)
        return found.identity()
    for second in adapters[1:]:
        told = why_apart(adapters[0], second)
        if told:
            raise UserError(told)
    prints = {key: value for adapter in adapters for key, value in _prints(adapter).items()}
    name = next((recorded_base(adapter) for adapter in adapters if _prints(adapter)), recorded_base(adapters[0]))
    if name is None:
        raise UserError(f"adapter {adapters[0].directory}: does not say which base it was trained on; pass --base")
    return {"base": name, **prints}


def why_apart(first: Adapter, second: Adapter) -> str:
    """Why two adapters cannot be taken for adapters of one base; empty where they can."""
    ones, others = _prints(first), _prints(second)
    names = recorded_base(first), recorded_base(second)
    for key, what in FINGERPRINTS.items():
        if key in ones and key in others and ones[key] != others[key]:
            return (
                f"adapter {first.directory} was trained on {names[0]} ({what} {ones[key][:12]}), {second.directory} on "
                f"{names[1]} ({what} {others[key][:12]}); an update means nothing on another base"
            )
    if "base_fingerprint" in ones.keys() & others.keys() or (None not in names and names[0] == names[1]):
        return ""
    silent = second if "base_fingerprint" not in others else first
    return (
        f"adapter {first.directory} names the base {names[0]}, {second.directory} {names[1]}, and {silent.directory} "
        "holds no fingerprint that would tell whether these are the same; pass --base if they are"
    )


def _prints(adapter: Adapter) -> dict[str, str]:
    recorded = adapter.provenance or {}
    return {key: recorded[key] for key in FINGERPRINTS if isinstance(recorded.get(key), str)}
