"""The recipe: what to learn, typed and validated whole; every problem is listed at once.

A recipe is a YAML file; dotted overrides (`optim.lr=1e-4`) win over it. Field docstrings below are the source of
`docs/recipe.md`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from peftune.errors import UserError


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Source(Section):
    """Where documents come from; a bare string in the recipe is short for `{path: string}`."""

    path: str
    """A file (txt, jsonl, json, csv, tsv, parquet), a glob, `builtin:DOMAIN/PART`, or the name of a hub data set."""
    text: str | None = None
    """Column that holds plain text; `text` is used where neither this nor `prompt` is given."""
    prompt: str | None = None
    """Column of the prompt (context, never scored); goes with `completion`."""
    completion: str | None = None
    """Column of the completion (scored)."""
    messages: str | None = None
    """Column of chat messages, each `{role, content}`; only what the assistant says is scored."""
    split: str | None = None
    """Split of a hub data set (default `train`)."""
    subset: str | None = None
    """Configuration name of a hub data set."""

    @model_validator(mode="after")
    def _columns_make_sense(self) -> Source:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt + completion, messages")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


SourceLike = Annotated[Source, BeforeValidator(_as_source)]
SourceList = Annotated[list[SourceLike], BeforeValidator(_as_list), Field(min_length=1)]


def _validation_kind(value: Any) -> Any:
    """A mapping whose keys are not those of a source names evaluation domains."""
    if isinstance(value, dict) and not set(value) & set(Source.model_fields):
        return {str(name): _as_list(source) for name, source in value.items()}
    return _as_list(value)


class Data(Section):
    """What is read, and how it becomes blocks of tokens."""

    train: SourceList
    """Sources to learn from: a path, a list of paths, or mappings with `path` and the columns to read."""
    validation: Annotated[
        Annotated[float, Field(ge=0.0, lt=1.0)] | SourceList | dict[str, SourceList], BeforeValidator(_validation_kind)
    ] = 0.05
    """A fraction held out by document hash (equal documents fall on one side), sources, or named domains of sources."""
    block_size: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Tokens per block; `auto` is the context length of the base (1,024 for GPT-2)."""
    packing: bool = True
    """Lay several documents in one row; `false` gives each a row of its own, sorted by length. Same result, slower."""
    join: Literal[" ", ""] = " "
    """Put between prompt and completion where neither has white space at the seam."""
    split_on: Literal["auto", "blank-line", "endoftext", "file", "line"] = "auto"
    """How a txt file becomes documents; `auto`: at `<|endoftext|>` if the file has one, else at two blank lines if
    it has any, else at one blank line."""


class Lora(Section):
    """The adapter."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of each adapter."""
    targets: Literal["all", "attention"] | Annotated[list[str], Field(min_length=1)] = "all"
    """`all` linear layers of every block, `attention` only, or module names (`c_attn`, `mlp.c_fc`, `lm_head`, …)."""
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """LoRA (2106.09685), rank-stabilised LoRA (2312.03732), DoRA (2402.09353) or PiSSA (2404.02948)."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Adapt only these blocks, counted from 0; null adapts all."""
    modules_to_save: list[str] = []
    """Modules trained whole and stored in the adapter (`wte`, `lm_head`, `ln_f`, …)."""


class Optim(Section):
    """AdamW and its schedule; a step is an optimizer step."""

    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak learning rate."""
    lr_b_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+ (2402.12354): the rate of the B matrices is lr times this."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Course of the rate after the warm-up: to zero on a line or half a cosine, or constant."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Share of all steps with a rising rate (below 1), or a number of steps (1 and above)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapter matrices."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null does not clip."""
    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training blocks; not used when `steps` is given."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Number of optimizer steps, instead of `epochs`."""
    neftune: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune (2310.05914): strength of the uniform noise on embeddings while training; 0 is off."""


class Batch(Section):
    """How many blocks make a step and how many make a forward."""

    global_size: Annotated[int, Field(ge=1)] = 32
    """Blocks per optimizer step, over all ranks and micro-batches."""
    micro_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Blocks per forward on one rank; `auto` starts from the largest sensible and halves when memory runs out."""


class Run(Section):
    """Where results go, and how the run behaves."""

    out: str
    """Adapter directory to write."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the adapter's initial values, the order of samples and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the hardware has it, else fp32 (fp16 with loss scaling on GPUs without bf16)."""
    eval_every: Annotated[int, Field(ge=0)] = 50
    """Steps between evaluations; 0 evaluates before and after only."""
    save_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 saves on signals and at the end only."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in `out`; `never` refuses to start where there is one."""
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Experiment trackers to write to, each only if it is installed."""
    checkpointing: bool = False
    """Recompute activations in the backward: about a quarter slower, much less memory."""
    early_stopping: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better validation loss; the best step is what is delivered."""
    samples: list[str] = []
    """Prompts continued greedily at each evaluation and recorded; "" begins a document."""
    base_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the frozen base (GPT-2 was pretrained with 0.1; for LoRA it only slows training)."""


class Recipe(Section):
    """A whole training run."""

    base: str
    """Hub name (`gpt2`), directory, or `builtin:small`."""
    quantize: Literal["int8", "nf4"] | None = None
    """Load the frozen base in 8 or 4 bits."""
    data: Data
    lora: Lora = Lora()
    optim: Optim = Optim()
    batch: Batch = Batch()
    run: Run

    @model_validator(mode="after")
    def _numbers_fit(self) -> Recipe:
        problems = []
        if self.quantize is not None:
            problems.append(f"quantize: {self.quantize} is not part of this release, use null")
        micro = self.batch.micro_size
        if micro != "auto" and micro > self.batch.global_size:
            problems.append(f"batch: micro_size {micro} is larger than global_size {self.batch.global_size}")
        if self.run.early_stopping and (self.data.validation == 0 or not self.run.eval_every):
            problems.append("run.early_stopping needs data.validation and run.eval_every")
        if self.run.precision == "fp16" and self.run.checkpointing:
            pass
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `key=value` overrides; UserError names every problem in one line."""
    return recipe_from(read_yaml(Path(path)), overrides or [], str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; UserError where it cannot be read or holds something else."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping with base, data and run; found {type(value).__name__}")
    return value


def recipe_from(values: dict[str, Any], overrides: list[str], name: str = "recipe") -> Recipe:
    """Validate a mapping with overrides applied; all problems are joined in one UserError."""
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(item) for item in error.errors()))
        raise UserError(f"{name}: " + "; ".join(problems)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key=value, such as optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent} is not a section")
        values = inner
    values[last] = value


def _problem(item: Any) -> str:
    """One line of plain words for one pydantic error."""
    place = [part for part in item["loc"] if not _is_internal(part)]
    where = ".".join(str(part) for part in place)
    if item["type"] == "extra_forbidden":
        known = _keys_of(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where}, {hint}"
    if item["type"] == "missing":
        return f"{where} is missing"
    if item["type"] == "value_error":
        return (f"{where}: " if where else "") + str(item["ctx"]["error"])
    return f"{where}: {item['msg'][:1].lower()}{item['msg'][1:]}, found {item['input']!r}"[:300]


def _is_internal(part: Any) -> bool:
    """pydantic puts the names of union members into a location; a person did not write them."""
    return isinstance(part, str) and (part.startswith(("function-", "list[", "constrained", "dict[", "literal[", "float", "int")) or part == "Source")


def _keys_of(place: list[Any]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in place:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        section = inner[0] if inner else Source
    return list(section.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as text; people and every other tool mean a number. Repeated keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise ValueError(f"key {sorted(repeated)[0]} is given twice")
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace("_", ""))


def _teach_scientific_notation() -> type[_Loader]:
    import re

    _Loader.add_implicit_resolver("!sci", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
    _Loader.add_constructor("!sci", _number)
    return _Loader


_teach_scientific_notation()
