"""What adapter_config.json may say: the types and ranges of PEFT's LoRA settings, checked where the file is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from peftune.adapters.module_names import check_pattern
from peftune.config.messages import validation_messages
from peftune.errors import UserError


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return check_pattern(value)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"expected names of modules or a regular expression, found {repr(value)[:200]}")
    return value


def _init(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | str):
        raise ValueError(f"expected true, false or the name of an initialisation, found {value!r}")
    return value


def _different(value: list[int]) -> list[int]:
    if len(set(value)) != len(value):
        raise ValueError(f"token {next(i for i in value if value.count(i) > 1)} is named twice; expected each once")
    return value


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1_000_000), AfterValidator(_different)
]
Pattern = Annotated[str, AfterValidator(check_pattern)]
Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=200)]  # PEFT reads these as patterns too
PlainNames = Annotated[list[Plain], Field(max_length=100)]
Names = Annotated[Any, AfterValidator(_names)]
Alpha = Annotated[float, Field(gt=0, lt=3e38)]  # a scale, computed in float32
Init = Annotated[Any, AfterValidator(_init)]


class PeftLoraSettings(BaseModel):
    """The settings that decide what a LoRA computes; `layout` judges the others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    r: PositiveInt
    lora_alpha: Alpha
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: PlainNames | None = None
    layers_to_transform: int | Annotated[list[int], Field(max_length=1_000)] | None = None
    layers_pattern: Plain | PlainNames | None = None
    rank_pattern: Annotated[dict[Pattern, PositiveInt], Field(max_length=5_000)] | None = None
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=5_000)] | None = None
    trainable_token_indices: TokenIds | Annotated[dict[Plain, TokenIds], Field(max_length=100)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: Init = True
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False


WITHOUT_EFFECT = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping",
    "fan_in_fan_out", "lora_dropout", "runtime_config",
}  # fmt: skip
"""Settings that do not change what a trained adapter computes."""
UNDERSTOOD = {
    *PeftLoraSettings.model_fields, *WITHOUT_EFFECT, "peft_type", "megatron_core", "eva_config", "qalora_group_size",
}  # fmt: skip


def check(config: dict[str, Any], source: str) -> None:
    """UserError naming every setting that is of another type or out of range; `source` names the file."""
    try:
        PeftLoraSettings.model_validate(config)
    except ValidationError as error:
        messages = validation_messages(error, {"": list(PeftLoraSettings.model_fields)})
        raise UserError(f"{source}: {'; '.join(messages)}") from None
