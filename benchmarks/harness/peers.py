"""Other trainers and their settings: `benchmarks/peers.yaml`, and what a command line changes.

`--tune NAME:KEY=VALUE` changes any of them, `--peer JSON` adds one; all settings are printed with the figures. KEY is a
field of TrainingArguments (of SFTConfig for TRL), or of `Peer`: `weights`, `dropout`, `attention`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Peer:
    """One trainer with its settings; what is not named stays at its own default."""

    name: str
    trainer: Literal["trl", "trainer", "loop"]
    """TRL's SFTTrainer, Transformers' Trainer with PEFT, or a bare loop around a PEFT model (no trainer's overhead)."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How the frozen base is held; adapter matrices are float32 in the loop, PEFT's own choice in the others."""
    dropout: float | None = None
    """The base's dropouts; None leaves GPT-2's 0.1."""
    attention: str | None = None
    """Transformers' `attn_implementation`; None lets it choose (sdpa)."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Settings as they are printed."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "name"}


PEERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).parents[1].joinpath("peers.yaml").read_text())["peers"]


def chosen(names: str, tunes: list[str], added: list[str]) -> list[Peer]:
    """Peers by name (with commas), tuned, and those described in JSON; ValueError names what is not known."""
    asked = list(filter(None, names.split(",")))
    if unknown := [name for name in asked if name not in PEERS]:
        raise ValueError(f"--peers {', '.join(unknown)}: known are {', '.join(PEERS)}")
    found = {name: {"name": name, "arguments": {}, **PEERS[name]} for name in asked}
    found |= {peer["name"]: {"arguments": {}, **peer} for peer in map(json.loads, added)}
    own = {each.name for each in fields(Peer)} - {"name", "trainer", "arguments"}
    for tune in tunes:
        name, _, setting = tune.partition(":")
        key, separator, value = setting.partition("=")
        if name not in found or not separator:
            raise ValueError(f"--tune {tune}: expected NAME:KEY=VALUE with NAME one of {', '.join(found)}")
        peer = found[name]
        found[name] = peer | ({key: yaml.safe_load(value)} if key in own else
                              {"arguments": {**peer["arguments"], key: yaml.safe_load(value)}})  # fmt: skip
    return [Peer(**peer) for peer in found.values()]
