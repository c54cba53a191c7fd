"""Put an adapter on a model in memory, through PEFT's own loading, and see that it has arrived."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.base_of import read_for
from peftune.adapters.directory import Adapter
from peftune.adapters.layout import AdapterLayout, changes_base, plain_name
from peftune.errors import CheckFailed, UserError, first_line
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import quiet_peft
from peftune.model.tokenizer import VOCABULARIES, load_tokenizer
from peftune.model.weights import WTE


def fit(
    adapter_dir: Path, base: Base, new_tokens: bool = True
) -> tuple[Adapter, AdapterLayout, PreTrainedTokenizerFast]:
    """What an adapter holds and changes, and the tokenizer of its texts: its own where it has rows for new tokens.

    UserError where it does not fit the base, and where it has rows for tokens without a tokenizer that knows them, or
    though `new_tokens` are not wanted.
    """
    adapter, layout = read_for(adapter_dir, base)
    beyond = _beyond(layout, base.config, len(base.tokenizer))
    if not beyond:
        return adapter, layout, base.tokenizer
    if not new_tokens or not any((adapter_dir / name).is_file() for name in VOCABULARIES):
        raise UserError(f"adapter {adapter_dir}: {beyond}")
    config = copy.copy(base.config)
    config.vocab_size = layout.vocabulary
    try:
        tokenizer = load_tokenizer(adapter_dir, config, base.stored_config)
    except UserError as error:
        raise UserError(f"adapter {str(error).removeprefix('base ')}") from None
    own = tokenizer.get_vocab()
    for token, number in base.tokenizer.get_vocab().items():
        if own.get(token) != number:
            raise UserError(
                f"adapter {adapter_dir}: in its tokenizer {token!r} is not token {number}, as in the base's"
            )
    return adapter, layout, tokenizer


def load_with_rows(base: Base, adapter: Adapter, layout: AdapterLayout) -> PeftModel:
    """The base with rows for all tokens that the adapter has, and the adapter on it, frozen; arguments as of `fit`.

    Raises UserError where PEFT cannot load it, CheckFailed where it has not arrived as it is in the file.
    """
    model = load_model(base)
    if layout.vocabulary > base.config.vocab_size:
        model.resize_token_embeddings(layout.vocabulary, mean_resizing=False)
    _check_embedding(adapter, model)
    directory = str(adapter.directory)
    # Loading with low memory assigns tensors instead of copying them: tied tensors of the base would become untied.
    low_memory = not changes_base(adapter.config) and not layout.replaced
    options: dict[str, Any] = {"torch_device": "cpu", "low_cpu_mem_usage": low_memory}
    # PEFT gets no pattern of the adapter's; how it was started matters only where that altered the base
    start = "pissa" if adapter.config.get("init_lora_weights") == "pissa" else True
    settings = LoraConfig(**{**layout.settings, "init_lora_weights": start, "inference_mode": True})
    with quiet_peft():
        try:
            adapted = PeftModel.from_pretrained(model, directory, config=settings, **options)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"adapter {directory}: PEFT cannot load it: {first_line(error)}") from None
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # PEFT only warns about names that it does not know, so what it holds now is compared with the file
    tensors = {plain_name(key): tensor for key, tensor in adapter.tensors.items()}
    for key, tensor in loaded.items():
        stored = tensors.get(plain_name(key))
        if stored is None or not torch.equal(stored.to(tensor.dtype), tensor.detach().cpu()):
            raise CheckFailed(f"adapter {directory}: {key} did not arrive in the model as it is in the file")
    return adapted


def _beyond(layout: AdapterLayout, base: GPT2Config, known: int) -> str:
    """Why a base has too few tokens for an adapter, or its tokenizer, which knows so many; empty where neither has."""
    if layout.vocabulary != base.vocab_size:
        reason = f"has {layout.vocabulary} tokens, the base has {base.vocab_size}"
    elif (rows := layout.rows.get(WTE)) is not None and rows.height(known) > known:
        reason = (
            f"has rows up to token {rows.height(known) - 1:,}, the base's tokenizer knows {known:,} tokens, so no text "
            "would use them"
        )
    else:
        return ""
    return f"{reason}; fold it in with peftune merge first"


def _check_embedding(adapter: Adapter, model: GPT2LMHeadModel) -> None:
    """PEFT stores the embedding beside an adapter of lm_head, and writes it into the base on loading."""
    for name, tensor in adapter.tensors.items():
        if name.endswith(".base_layer.weight") and not changes_base(adapter.config):
            embedding = model.lm_head.weight.detach().cpu()
            if not torch.equal(embedding, tensor.to(embedding.dtype)):
                raise UserError(
                    f"adapter {adapter.directory}: {name} is not the embedding of this base; "
                    "pass the base that it was trained on, or fold it in with peftune merge"
                )
