"""The frozen base: find it, check that it is a GPT-2, load its weights and tokenizer."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftune.errors import UserError, first_line
from peftune.model import architecture, quantized
from peftune.model.weights import check_whole, open_weights

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BUILTIN = {"builtin:small": Path(__file__).with_name("small")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_WANTED = ["*.json", "*.safetensors", "*.bin", "merges.txt", "vocab.json"]


def resolve(name: str) -> Path:
    """The local directory of a base: `builtin:small`, a directory, or a hub name (downloaded once).

    Raises UserError where it is none of these, or where the hub cannot be reached and holds no copy.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UserError(f"base {name}: there is no such built-in base; known: {', '.join(BUILTIN)}")
        return BUILTIN[name]
    try:
        path = Path(name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, ~name without such a user
        raise UserError(f"base {name[:200]}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        return _checked(path, name)
    if exists or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(
            f"base {name}: no such directory; expected a GPT-2 checkpoint directory, a hub name or builtin:small"
        )
    return _from_hub(name)


def _checked(path: Path, name: str) -> Path:
    """A directory with a model in it, and with nothing that Transformers would put on it without a word."""
    adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        hint = "; it is an adapter, pass it as --adapter" if adapter else ""
        raise UserError(f"base {name}: no config.json in this directory{hint}")
    if adapter:
        raise UserError(
            f"base {name}: holds an adapter beside the model, and Transformers would load both as one; "
            "move adapter_config.json and its weights to a directory of their own"
        )
    return path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(name, allow_patterns=_WANTED))
    except HFValidationError:
        raise UserError(f"base {name!r}: neither a directory nor a valid hub name") from None
    except RepositoryNotFoundError:
        raise UserError(f"base {name}: no such directory, and the hub knows no such model") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        cause = first_line(error).partition(". ")[0]
        raise UserError(f"base {name}: no such directory here, and the hub could not be reached ({cause})") from None
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return _checked(directory, name)
    raise UserError(f"base {name}: the hub's copy holds no weights in safetensors or .bin form")


def load_config(directory: Path) -> GPT2Config:
    """The configuration of a GPT-2 checkpoint; another architecture is refused by name."""
    from transformers import GPT2Config

    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"base {directory}: config.json cannot be read: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "gpt2":
        raise UserError(f"base {directory}: model_type is {kind}, peftune trains GPT-2 models only (model_type gpt2)")
    architecture.check(values, directory)
    return GPT2Config.from_pretrained(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint directory, with `<|endoftext|>` as its end token."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"base {directory}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"base {directory}: the tokenizer cannot be read: {first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"base {directory}: expected a fast tokenizer with an end token, found {type(tokenizer).__name__}"
        )
    _check_vocabulary(tokenizer, load_config(directory).vocab_size, directory)
    return tokenizer  # type: ignore[no-any-return]


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, directory: Path) -> None:
    """Every token that a text can become has a row; special ones beyond (a `[PAD]` added later) are never made."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [number for number in tokenizer.get_vocab().values() if number not in added]
    if len(texts) < 2:
        raise UserError(f"base {directory}: the tokenizer knows {len(texts)} tokens; expected its whole vocabulary")
    largest = max(*texts, tokenizer.eos_token_id)
    if largest >= rows:
        raise UserError(
            f"base {directory}: its tokenizer knows token {largest}, but the embedding has {rows} rows; "
            "pass a base with its own tokenizer"
        )


def with_dropout(config: GPT2Config, dropout: float) -> GPT2Config:
    """The configuration of a model that is trained here: its own dropouts set, attention through SDPA."""
    config = copy.deepcopy(config)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    config._attn_implementation = "sdpa"
    return config


def load_model(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dropout: float = 0.0,
    quantize: quantized.Kind | None = None,
) -> GPT2LMHeadModel:
    """The whole model in `dtype`, in evaluation mode, SDPA attention, its own dropouts set to `dropout`.

    `quantize` stores the linear layers of the blocks in 8 or 4 bits, made from the weights in float32 whatever `dtype`
    is, one tensor after the other. Raises UserError where weights are missing, truncated or of other shapes than
    config.json says.
    """
    quantized.require(quantize)
    from safetensors import SafetensorError
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    config = with_dropout(load_config(directory), dropout)
    check_whole(open_weights(directory), config)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": dtype}
    if quantize is not None:
        options = {"dtype": torch.float32, **quantized.loading_options(quantize, device)}
    try:
        model: Any = GPT2LMHeadModel.from_pretrained(directory, config=config, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"base {directory}: the weights cannot be read: {first_line(error)}") from None
    if quantize is None:
        return model.to(device).eval()  # type: ignore[no-any-return]
    quantized.multiply_unpacked(model)
    model.requires_grad_(False)
    place(model, device, dtype)
    return model.eval()  # type: ignore[no-any-return]


def place(model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
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

    def told(self, kind: str) -> str:
        """One line for people."""
        held, fp32, bf16 = (f"{number / 1e6:,.1f} MB" for number in (self.held, self.fp32, self.bf16))
        return f"base: {held} as {kind} (fp32 {fp32}, bf16 {bf16})"


def footprint(model: torch.nn.Module) -> Footprint:
    """The memory of everything frozen in a model, scales of quantised weights included, shared tensors once."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tensors = [tensor for parameter in frozen for tensor in (parameter, *quantized.constants(parameter))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    weights = sum(quantized.elements(parameter) for parameter in frozen)
    return Footprint(sum(storages.values()), 4 * weights, 2 * weights)
