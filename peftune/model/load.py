"""The base as a model in memory, alone or with a fresh adapter, in full precision or quantised."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftune.config.recipe import BLOCK_LINEARS, Recipe
from peftune.device import return_freed_memory
from peftune.errors import CheckFailed, UserError, first_line
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.tokenizer import with_new_tokens
from peftune.model.weights import NOT_FINITE, all_finite

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    from peftune.model.lora import Adapted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Environment of oneDNN and of PyTorch's layer above it: how many kernels each keeps, of those made for one shape of a
product. As they come it is 1,024 each, and nearly every step has documents of other lengths, so a run in bf16 on a CPU
would grow by 0.7 GB in its first 40 steps. The shapes of one step fit into 64: it is about as fast as it was."""


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that fp32, bf16 or fp16 names; UserError for any other name."""
    if precision not in DTYPES:
        raise UserError(f"precision is {precision}, expected one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def with_dropout(config: GPT2Config, dropout: float) -> GPT2Config:
    """The configuration of a model that is trained here: its own dropouts set, attention through SDPA."""
    config = copy.deepcopy(config)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    config._attn_implementation = "sdpa"
    return config


def load_model(
    base: Base,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dropout: float = 0.0,
    quantize: quantized.Kind | None = None,
) -> GPT2LMHeadModel:
    """The full model in `dtype`, in evaluation mode, SDPA attention, its own dropouts set to `dropout`.

    `quantize` stores the linear layers of the blocks in 8 or 4 bits, made from the weights in float32 whatever `dtype`
    is, one tensor after the other. Raises UserError where weights are missing, truncated or of other shapes than
    config.json says.
    """
    keep_kernels()
    if quantize is not None:
        quantized.require(quantize)
        for name in base.weights.names():  # reading checks them; packed, nobody would see it
            for _ in base.weights.chunks(name):
                pass
    from safetensors import SafetensorError
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    config = with_dropout(base.config, dropout)
    assert base.weights, "read first: it tells what is missing more clearly than Transformers does"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options = {} if quantize is None else quantized.loading_options(quantize, device)
    options["dtype"] = dtype if quantize is None else torch.float32
    verbosity = logging.get_verbosity()
    # no table of mask buffers and copies; what is missing `base.weights` has told
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model: Any = GPT2LMHeadModel.from_pretrained(base.directory, config=config, **options)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(f"base {base.directory}: the weights cannot be read: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if quantize is None:
        for name, parameter in model.named_parameters():
            if not all_finite(parameter.detach()):
                raise CheckFailed(f"base {base.directory}: as {dtype}, {name} {NOT_FINITE}")
        return model.to(device).eval()  # type: ignore[no-any-return]
    quantized.multiply_unpacked(model)
    model.requires_grad_(False)
    move_to(model, device, dtype)
    return_freed_memory()  # of the weights in float32
    return model.eval()  # type: ignore[no-any-return]


def keep_kernels(adapters: int = 1, most: int = 1024) -> None:
    """Have a CPU keep kernels for products with so many adapters at once, unless the user has chosen.

    The first product of the process settles it.
    """
    for variable, of_one in KERNELS_KEPT.items():
        os.environ.setdefault(variable, str(min(most, adapters * int(of_one))))


def load_adapted(
    recipe: Recipe,
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    settings: LoraConfig | None = None,
    model: GPT2LMHeadModel | None = None,
) -> Adapted:
    """The base with a fresh adapter: adapter in fp32, frozen weights in `dtype` where only blocks are adapted.

    DoRA and PiSSA derive initial values from the base's weights, so they see them in fp32 first. Trained
    embeddings, norms or heads keep the full base in fp32 (matrix products still use `dtype`). What `quantize` packs
    stays packed; LoftQ reads the weights of the base once more, one after the other, to see what packing lost.
    `settings` are PEFT's, where the recipe cannot say them. `model` is what `load_base` made for a recipe of this kind.
    """
    from peftune.model.lora import inject

    if device.type == "cpu":
        device = torch.device("cpu")  # a rank's is cpu:0, on which int8 weights would be kept twice
    model = model or load_base(recipe, base, dtype, device)
    rows = _add_rows(model, base, recipe.data.new_tokens) if recipe.data.new_tokens else []
    adapted = inject(model, recipe.lora, recipe.run.seed, base.weights.tensor, rows, settings)
    move_to(adapted.model, device, dtype if only_blocks_are_trained(adapted) else torch.float32)
    if recipe.run.checkpointing:
        recompute_activations(adapted)
    return adapted


def load_base(recipe: Recipe, base: Base, dtype: torch.dtype, device: torch.device) -> GPT2LMHeadModel:
    """The base as an adapter of this recipe is put on it, for a run in `dtype`."""
    return load_model(
        base,
        dtype=torch.float32 if needs_exact_base(recipe) else dtype,
        device="cpu" if recipe.quantize is None else device,
        dropout=recipe.run.base_dropout,
        quantize=recipe.quantize,
    )


def needs_exact_base(recipe: Recipe) -> bool:
    """Whether first values come of the base's weights, or more is trained than the linear layers of blocks."""
    lora = recipe.lora
    targets = [] if isinstance(lora.targets, str) else lora.targets
    outside = any(name.rpartition(".")[2] not in BLOCK_LINEARS for name in targets)
    return outside or lora.variant in ("dora", "pissa") or bool(lora.modules_to_save or recipe.data.new_tokens)


def with_the_same_weights(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A copy of a model's modules over the same tensors: what is put on it, the other does not see."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def rows_of(base: Base, new_tokens: Sequence[str]) -> list[int]:
    """The rows of new tokens (at least one), in order.

    Rows before them that no token has are among them where the base does not have them either.
    """
    vocabulary, rows = with_new_tokens(base.tokenizer, new_tokens).get_vocab(), base.config.vocab_size
    ids = {vocabulary[name] for name in new_tokens}
    return sorted({*ids, *range(rows, max(ids) + 1)})


@torch.no_grad()
def _add_rows(model: GPT2LMHeadModel, base: Base, new_tokens: Sequence[str]) -> list[int]:
    """The rows of new tokens, each the mean of the rows of the tokens that the base knows."""
    trained, rows = rows_of(base, new_tokens), base.config.vocab_size
    if trained[-1] >= rows:
        model.resize_token_embeddings(trained[-1] + 1, mean_resizing=False)
    known = min(rows, len(base.tokenizer))
    for name in ("transformer.wte.weight", "lm_head.weight"):  # twice the same where they are tied
        weight = model.get_parameter(name)
        weight[trained] = weight[:known].mean(dim=0)
    return trained


def recompute_activations(adapted: Adapted) -> None:
    """Non-reentrant, so that gradients reach the adapter although nothing before it is trained."""
    core: Any = adapted.model.base_model.model  # Transformers 5 renamed the switch
    enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def only_blocks_are_trained(adapted: Adapted) -> bool:
    """Whether nothing outside the blocks' linear layers is trained; then frozen weights can be rounded."""
    return all(".h." in name and ".ln_" not in name for name in adapted.trainable())


def move_to(model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device: what is trained as float32, what is frozen as `dtype`, what is quantised as it is."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else dtype)
    model.to(device)


@dataclass(frozen=True)
class Footprint:
    """Memory of a loaded base in bytes, and what its weights would take as float32 and as bfloat16."""

    held: int
    fp32: int
    bf16: int

    def description(self, kind: str) -> str:
        """One line for people."""
        held, fp32, bf16 = (f"{number / 1e6:,.1f} MB" for number in (self.held, self.fp32, self.bf16))
        return f"base: {held} as {kind} (fp32 {fp32}, bf16 {bf16})"


def footprint(model: torch.nn.Module) -> Footprint:
    """The memory of everything frozen in a model, scales of quantised weights included, shared tensors once."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tensors: list[torch.Tensor] = list(frozen)
    weights = sum(parameter.numel() for parameter in frozen)
    if getattr(model, "is_quantized", False):
        tensors += [tensor for parameter in frozen for tensor in quantized.constants(parameter)]
        weights = sum(quantized.elements(parameter) for parameter in frozen)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return Footprint(sum(storages.values()), 4 * weights, 2 * weights)
