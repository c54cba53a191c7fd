"""What config.json of a GPT-2 may say, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftune.config.messages import validation_messages
from peftune.errors import UserError
from peftune.files import read_object

if TYPE_CHECKING:
    from transformers import GPT2Config

Size = Annotated[int, Field(gt=0)]


class Architecture(BaseModel):
    """The values that decide shapes and arithmetic; the defaults are those of GPT-2 itself."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Size = 12
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


def fingerprint(config: GPT2Config) -> str:
    """sha256 of the values that decide shapes and arithmetic, however config.json spells them."""
    values = {name: getattr(config, name) for name in DECISIVE} | {"n_inner": config.n_inner or 4 * config.n_embd}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_values(directory: Path) -> dict[str, Any]:
    """What config.json says, as it is stored; another architecture than GPT-2 is refused by name.

    Raises UserError naming every value that no GPT-2 can have.
    """
    values = read_object(directory / "config.json", f"base {directory}: config.json")
    kind = values.get("model_type")
    if kind != "gpt2":
        raise UserError(f"base {directory}: model_type is {kind}, peftune trains GPT-2 models only (model_type gpt2)")
    try:
        Architecture.model_validate(values)
    except ValidationError as error:
        found = "; ".join(validation_messages(error, {"": list(Architecture.model_fields)}))
        raise UserError(f"base {directory}: config.json: {found}") from None
    return values
