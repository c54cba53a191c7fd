"""What config.json of a GPT-2 may say, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftune.config.messages import validation_messages
from peftune.errors import UserError
from peftune.files import read_object

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2Config

_CLASSES = {
    "GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
}  # fmt: skip
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Three spellings of one function: GELU, approximated with tanh."""
FAMILY = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
"""Layers, width and heads of the published checkpoints."""
_TRANSFORMERS = (5, 4)
Size = Annotated[int, Field(gt=0, le=1 << 24)]
Layers = Annotated[int, Field(gt=0, le=1_000)]  # each is built to know its tensors, before any is looked for


class Architecture(BaseModel):
    """The values that decide shapes and arithmetic; the defaults are those of GPT-2 itself."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Layers = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False

    @model_validator(mode="after")
    def _numbers_fit(self) -> Architecture:
        from transformers.activations import ACT2FN

        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function {self.activation_function!r} is none that Transformers knows")
        if self.add_cross_attention:
            raise ValueError("add_cross_attention is true; peftune trains language models, not decoders of others")
        return self


# Whether the head is tied shows in the weights; upcasting changes rounding only.
DECISIVE = sorted(set(Architecture.model_fields) - {"tie_word_embeddings", "reorder_and_upcast_attn"})


@cache
def require_transformers() -> None:
    """UserError where Transformers is one that computes some GPT-2s wrongly without a word (transformers#44397)."""
    found = metadata.version("transformers")
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < _TRANSFORMERS:
        raise UserError(
            f"transformers {found} is installed, expected 5.4 or newer: before it, attention ignores two keys of "
            'GPT-2\'s configuration; run pip install "transformers>=5.4"'
        )


def fingerprint(config: GPT2Config) -> str:
    """sha256 of the values that decide shapes and arithmetic, however config.json spells them."""
    values = {name: getattr(config, name) for name in DECISIVE} | {"n_inner": config.n_inner or 4 * config.n_embd}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of this name in config.json; torch's own where Transformers writes GELU out."""
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_pytorch_tanh" if name in TANH_GELU else name]  # type: ignore[no-any-return]


def attention_scales(config: GPT2Config) -> list[float]:
    """What the products of queries and keys are multiplied with, block by block."""
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return [scale / (number + 1) if by_layer else scale for number in range(config.n_layer)]


def read_values(directory: Path) -> dict[str, Any]:
    """What config.json says, numbers in the types that Transformers expects; another architecture is refused by name.

    Uploads of 2019 have no `model_type`; their `architectures` tell. Raises UserError naming every value that no GPT-2
    can have.
    """
    values = read_object(directory / "config.json", f"base {directory}: config.json")
    if reason := _reason_against(values):
        raise UserError(f"base {directory}: {reason}")
    values = {key: _as_expected(key, value) for key, value in values.items()} | {"model_type": "gpt2"}
    try:
        Architecture.model_validate(values)
    except ValidationError as error:
        found = "; ".join(validation_messages(error, {"": list(Architecture.model_fields)}))
        raise UserError(f"base {directory}: config.json: {found}") from None
    return values


def _reason_against(values: dict[str, Any]) -> str | None:
    """Why a config.json is not that of a GPT-2 whose weights can be read, or None."""
    kind, names = values.get("model_type"), values.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    known = [name for name in names if str(name).removeprefix("TF").removeprefix("Flax") in _CLASSES]
    if kind is None and not known:
        said = f"; architectures is {', '.join(map(str, names))}" if names else ""
        return f"model_type is None, peftune trains GPT-2 models only (model_type gpt2){said}"
    if kind not in (None, "gpt2"):
        return f"model_type is {kind}, peftune trains GPT-2 models only (model_type gpt2)"
    if names and not known:
        return (
            f"architectures is {', '.join(map(str, names))}, a model of its own that computes with code from its "
            "repository; peftune runs no such code and trains plain GPT-2 only"
        )
    if (quantized := values.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        return (
            f"its weights are stored quantized ({method}); pass the checkpoint in full precision, and let the recipe's "
            "quantize pack it"
        )
    return None


def _as_expected(key: str, value: Any) -> Any:
    """A whole number where Transformers wants a float, and 0 or 1 where it wants a truth value, in that type."""
    kind = _kinds().get(key)
    if type(value) is int and kind is float:
        return float(value)
    return bool(value) if type(value) is int and value in (0, 1) and kind is bool else value


@cache
def _kinds() -> dict[str, Any]:
    from transformers import GPT2Config

    return dict(GPT2Config.__annotations__)
