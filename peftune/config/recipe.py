"""The recipe: what to learn, typed and validated; all problems are reported at once.

A recipe is a YAML file; dotted overrides (`optim.lr=1e-4`) win over it. Field docstrings below are the source of
`docs/recipe.md`.
"""

from __future__ import annotations

import copy
import os
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from peftune.config.choices import Device, Precision
from peftune.config.data_section import DataSection, Source
from peftune.config.messages import validation_messages
from peftune.config.new_tokens import reasons_against
from peftune.config.overrides import apply_override
from peftune.config.section import Fraction, NonEmpty, Section
from peftune.config.yaml_loader import read_yaml
from peftune.errors import UserError, refuse_bare_string

BLOCK_LINEARS = ("c_attn", "c_proj", "c_fc")
"""The linear layers of a GPT-2 block by their last name: what `quantize` packs."""
FLEET = "fleet"
"""The key of a file that holds many recipes (`config.fleet`)."""
_MOST = 1_000_000_000  # far beyond any use, and products of two fit into single precision


class LoraSection(Section):
    """The adapter."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[float, Field(gt=0, le=_MOST)] = 32
    """Scale: the update is multiplied by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    """Dropout on the input of each adapter."""
    targets: Literal["all", "attention", "query-value"] | Annotated[list[str], Field(min_length=1)] = "all"
    """`all` linear layers of every block, `attention` only, `query-value` for queries and values alone, each of this
    rank, as in the LoRA paper, or module names (`c_attn`, `mlp.c_fc`, `lm_head`, …)."""
    variant: Literal["lora", "rslora", "dora", "pissa", "loftq"] = "lora"
    """LoRA (2106.09685), rank-stabilised LoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), or, on a quantised
    base, LoftQ (2310.08659): a LoRA that starts as the best correction of what quantising took from the base."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Adapt only these blocks, counted from 0; null adapts all."""
    modules_to_save: list[str] = []
    """Modules trained in full and stored in the adapter (`wte`, `lm_head`, `ln_f`, …)."""


class OptimSection(Section):
    """AdamW and its schedule; a step is an optimizer step."""

    lr: Annotated[float, Field(gt=0, le=_MOST)] = 2.0e-4
    """Peak learning rate."""
    lr_b_ratio: Annotated[float, Field(gt=0, le=_MOST)] = 1.0
    """LoRA+ (2402.12354): the rate of the B matrices is lr times this."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Course of the rate after the warm-up: to zero on a line or half a cosine, or constant."""
    warmup: Annotated[float, Field(ge=0, le=_MOST)] = 0.03
    """Share of all steps with a rising rate (below 1), or a number of steps (1 and above)."""
    weight_decay: Annotated[float, Field(ge=0, le=_MOST)] = 0.0
    """Decoupled weight decay of the adapter matrices."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    clip: Annotated[float, Field(gt=0, le=_MOST)] | None = 1.0
    """Largest global gradient norm; null does not clip."""
    epochs: Annotated[float, Field(gt=0, le=_MOST)] = 3
    """Passes over the training blocks; not used when `steps` is given."""
    steps: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Number of optimizer steps, instead of `epochs`."""
    neftune: Annotated[float, Field(ge=0, le=_MOST)] = 0.0
    """NEFTune (2310.05914): strength of the uniform noise on embeddings while training; 0 is off."""
    label_smoothing: Fraction = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary while training (1512.00567). The
    training loss is then the smoothed one; evaluation never is."""


class BatchSection(Section):
    """How many blocks make a step and how many make a forward."""

    global_size: Annotated[int, Field(ge=1)] = 32
    """Blocks per optimizer step, over all ranks and micro-batches."""
    micro_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Blocks per forward on one rank; `auto` starts from the largest sensible and halves when memory runs out."""


def _output_directory(value: str) -> str:
    """With `~` as a shell would read it, which expands none after a `=`."""
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise ValueError("holds a control character (a line break, a tab); expected a name that can be shown")
    return os.path.expanduser(value)


class RunSection(Section):
    """Where results go, and how the run behaves."""

    out: Annotated[NonEmpty, AfterValidator(_output_directory)]
    """Adapter directory to write."""
    init: Annotated[NonEmpty, AfterValidator(_output_directory)] | None = None
    """Adapter directory to go on from: for more epochs, on other data, at another rate. What it decides (rank, alpha,
    targets, variant, modules_to_save, new tokens) need not be said again. It is not changed."""
    init_optimizer: bool = False
    """With `init`: also take AdamW's moments and step count, from the checkpoint that adapter was delivered from."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the adapter's initial values, the order of samples and dropout."""
    device: Device = "auto"
    """`auto`: a GPU where there is one, else the CPU; a run on a machine whose NVIDIA GPU torch cannot use is
    refused. `cpu` and `cuda` insist."""
    deterministic: bool = False
    """On a GPU, take only kernels that add up in the same order each time, so that equal runs are equal bit for bit;
    some are slower. A CPU's always do."""
    precision: Precision = "auto"
    """`auto`: bf16 where the hardware has it, else fp32 (fp16 with loss scaling on GPUs without bf16)."""
    eval_every: Annotated[int, Field(ge=0)] = 50
    """Steps between evaluations; 0 evaluates before and after only."""
    save_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 saves on signals and at the end only."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in `out`, and has nothing to do where the run is finished; `never`
    refuses to start where there is either."""
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Experiment trackers to write to; one that is not installed is refused (`pip install 'peftune[track]'`).
    TensorBoard's files go to `peftune/` in `out`."""
    checkpointing: bool = False
    """Recompute activations in the backward: about a quarter slower, much less memory."""
    early_stopping: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better validation loss, and deliver the best step. Where that is
    step 0, whose adapter changes nothing, none is delivered and the exit code is 4."""
    samples: list[str] = []
    """Prompts continued greedily at each evaluation and recorded; "" begins a document."""
    fast: bool = True
    """Compute steps by peftune's own GPT-2 where it applies (it says where not), to rounding what Transformers and PEFT
    compute; `false` always takes theirs."""
    compile: bool = False
    """Compile what stands between the matrix products of fast steps; needs a C++ compiler, on a GPU Triton. Takes up to
    a minute the first time, less from its cache afterwards, and is left out of runs too short to repay it."""
    base_dropout: Fraction = 0.0
    """Dropout inside the frozen base (GPT-2 was pretrained with 0.1; for LoRA it only slows training)."""


class Recipe(Section):
    """A training run."""

    base: NonEmpty
    """Hub name (`gpt2`), directory, or `builtin:small`."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen base in 8 or 4 bits (needs the extra `quant`). The adapter that comes out is
    one for the full-precision base."""
    data: DataSection
    lora: LoraSection = LoraSection()
    optim: OptimSection = OptimSection()
    batch: BatchSection = BatchSection()
    run: RunSection

    @model_validator(mode="after")
    def _numbers_fit(self) -> Recipe:
        problems = []
        if self.lora.targets == "query-value" and self.lora.variant not in ("lora", "rslora"):
            taken = f"query-value adapts parts of c_attn, {self.lora.variant} takes it whole"
            problems.append(f"lora.targets: {taken}; use lora or rslora")
        if self.quantize is None and self.lora.variant == "loftq":
            problems.append("lora.variant: loftq is for a quantised base; give quantize (int8, nf4) or another variant")
        if self.quantize and self.lora.variant == "pissa":
            problems.append("lora.variant: pissa takes its start out of the base's weights, which quantize has packed")
        for name in self.lora.modules_to_save if self.quantize else ():
            if name.rpartition(".")[2] in BLOCK_LINEARS:
                problems.append(f"lora.modules_to_save: {name} cannot be trained, quantize has packed it")
        if self.data.new_tokens:
            targets = [] if isinstance(self.lora.targets, str) else self.lora.targets
            problems += reasons_against([*self.lora.modules_to_save, *targets], self.quantize)
        micro = self.batch.micro_size
        if micro != "auto" and micro > self.batch.global_size:
            problems.append(f"batch: micro_size {micro} is larger than global_size {self.batch.global_size}")
        if self.run.init_optimizer and self.run.init is None:
            problems.append("run.init_optimizer takes AdamW's moments of the adapter in run.init; name one")
        if self.run.early_stopping and (self.data.validation == 0 or not self.run.eval_every):
            problems.append("run.early_stopping needs data.validation and run.eval_every")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_recipe(recipe: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Check a recipe, a YAML file or its values as a mapping, with `key=value` overrides applied.

    UserError names every problem in one line: an unknown key with the nearest known one, a value with what is expected.
    """
    refuse_bare_string(overrides, "overrides")
    if isinstance(recipe, dict):
        return recipe_from(_of_one(recipe, "recipe"), overrides or [])
    return recipe_from(values_of_one(recipe), overrides or [], str(recipe))


def values_of_one(path: str | Path) -> dict[str, Any]:
    """What the file of one recipe says, nothing checked; UserError for a fleet."""
    return _of_one(read_yaml(Path(path)), str(path))


def _of_one(values: dict[str, Any], name: str) -> dict[str, Any]:
    if FLEET in values:
        raise UserError(
            f"{name}: holds a fleet, many recipes in one file, which `peftune train`, `peftune launch` and, in Python, "
            "load_recipes take; expected one recipe here"
        )
    return values


def recipe_from(values: dict[str, Any], overrides: list[str], name: str = "recipe") -> Recipe:
    """Validate a mapping with overrides applied; all problems are joined in one UserError."""
    values = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: " + "; ".join(validation_messages(error, known_keys()))) from None


def known_keys() -> dict[str, list[str]]:
    """The keys of the recipe's top (""), of each section and of a source."""
    sections: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
    sections |= {"": Recipe, "data.train": Source, "data.validation": Source}
    return {name: list(section.model_fields) for name, section in sections.items() if hasattr(section, "model_fields")}
