"""Other trainers and their settings, as data: what a user gets by default, and the best tuning that was found.

`--tune NAME:KEY=VALUE` changes any of them, `--peer JSON` adds one; all settings are printed with the figures. KEY is a
field of TrainingArguments (of SFTConfig for TRL), or of `Peer`: `weights`, `dropout`, `attention`, `fp32_products`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
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
    fp32_products: Literal["ieee", "bf16"] | None = None
    """`torch.backends.mkldnn.matmul.fp32_precision`; "bf16" sends float32 products through oneDNN."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Settings as they are printed."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "name"}


# TRL's packed batch is one long row under a mask of its square: where no kernel skips the mask, small batches are best.
_PACKED = {"packing": True, "gradient_checkpointing": False, "bf16": True, "max_length": 512}
_TUNED: dict[str, Any] = {"weights": "bfloat16", "dropout": 0.0}
_ON_CUDA = {
    "packing": True, "gradient_checkpointing": False, "bf16": True, "per_device_train_batch_size": 16,
    "optim": "adamw_torch_fused", "tf32": True,
}  # fmt: skip
_FIXED = {"packing_strategy": "wrapped", "torch_compile": True}  # rows of one length: compiled once
_BY_LENGTH = {"train_sampling_strategy": "group_by_length"}

PEERS = {
    peer.name: peer
    for peer in (
        Peer("trl-default", "trl"),
        Peer("trl-packing", "trl", arguments={"packing": True}),
        Peer("trl-tuned", "trl", **_TUNED, arguments={**_PACKED, "per_device_train_batch_size": 1}),
        Peer("trl-tuned-2", "trl", **_TUNED, arguments={**_PACKED, "per_device_train_batch_size": 2}),
        Peer(
            "trl-tuned-wrapped", "trl", **_TUNED,
            arguments={**_PACKED, "packing_strategy": "wrapped", "per_device_train_batch_size": 4},
        ),
        Peer(
            "trl-tuned-by-length", "trl", **_TUNED,
            arguments={"gradient_checkpointing": False, "bf16": True, **_BY_LENGTH},
        ),
        Peer("trainer-default", "trainer"),
        Peer("trainer-bf16", "trainer", arguments={"bf16": True}),
        Peer("trainer-bf16-no-dropout", "trainer", dropout=0.0, arguments={"bf16": True}),
        Peer("trainer-tuned", "trainer", **_TUNED, arguments={"bf16": True}),
        Peer("trainer-tuned-2", "trainer", **_TUNED, arguments={"bf16": True, "per_device_train_batch_size": 2}),
        Peer("trainer-tuned-by-length", "trainer", **_TUNED, arguments={"bf16": True, **_BY_LENGTH}),
        Peer("trl-cuda-flash", "trl", **_TUNED, attention="flash_attention_2", arguments=_ON_CUDA),
        Peer("trl-cuda-sdpa", "trl", **_TUNED, arguments={**_ON_CUDA, **_BY_LENGTH, "packing": False}),
        Peer("trl-cuda-compiled", "trl", **_TUNED, arguments={**_ON_CUDA, **_FIXED}),
        Peer("peft-fp32", "loop"),
        Peer("peft-bf16", "loop", **_TUNED),
    )
}  # fmt: skip


def chosen(names: str, tunes: list[str], added: list[str]) -> list[Peer]:
    """Peers by name (with commas), tuned, and those described in JSON; ValueError names what is not known."""
    unknown = [name for name in names.split(",") if name and name not in PEERS]
    if unknown:
        raise ValueError(f"--peers {', '.join(unknown)}: known are {', '.join(PEERS)}")
    found = {name: PEERS[name] for name in names.split(",") if name}
    found |= {peer.name: peer for peer in (Peer(**json.loads(text)) for text in added)}
    for tune in tunes:
        name, _, setting = tune.partition(":")
        key, separator, value = setting.partition("=")
        if name not in found or not separator:
            raise ValueError(f"--tune {tune}: expected NAME:KEY=VALUE with NAME one of {', '.join(found)}")
        found[name] = _tuned(found[name], key, yaml.safe_load(value))
    return list(found.values())


def _tuned(peer: Peer, key: str, value: Any) -> Peer:
    own = {f.name for f in fields(Peer)} - {"name", "trainer", "arguments"}
    if key in own:
        return replace(peer, **{key: value})
    return replace(peer, arguments={**peer.arguments, key: value})
