"""A model and its adapters as GGUF, for llama.cpp and Ollama; read back before they are delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from peftune.adapters.base_of import read_for
from peftune.adapters.directory import check_free, new_directory
from peftune.adapters.gguf.tensors import GgufTensor, base_tensors, check_graph, lora_tensors
from peftune.adapters.gguf.vocabulary import gguf_vocabulary
from peftune.adapters.provenance import chat_of, read_provenance
from peftune.console import Console
from peftune.data.sources.chat_exports import ollama_lines
from peftune.data.sources.chat_template import EOS_TURNS
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base

TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
MODEL = "model.gguf"
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers for files of mostly such tensors


def export_gguf(base: Base, out: Path, adapters: Sequence[Path] = (), kind: str = "f32") -> list[Path]:
    """Write `out` with model.gguf, one NAME.gguf for each adapter directory, and an Ollama Modelfile for each.

    `kind` is how the matrices are stored: f32, f16 or q8_0. Raises UserError for what llama.cpp would compute
    otherwise than it was trained (activation, tokenizer, adapters beyond A and B), CheckFailed where the files read
    back are not what they should be; then there is no `out`.
    """
    if not find_spec("gguf"):
        raise UserError("export to GGUF needs the package gguf; install it with: pip install 'peftune[gguf]'")
    if kind not in TYPES:
        raise UserError(f"type {kind}: expected one of {', '.join(TYPES)}")
    check_free(out, "the export")
    check_graph(base.config)
    names = [adapter.resolve().name for adapter in adapters]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two adapters are called {min(repeated)}; each becomes a file of its name")
    loras = [list(lora_tensors(read_for(adapter, base)[1], base, str(adapter))) for adapter in adapters]
    with new_directory(out, "the export") as staging, Console().progress as progress:
        tensors = list(base_tensors(base))
        task = progress.add_task("writing", total=len(tensors) + sum(map(len, loras)), note="")
        _write_model(staging / MODEL, base, tensors, kind, lambda: progress.advance(task))
        for name, lora in zip(names, loras, strict=True):
            _write_lora(staging / f"{name}.gguf", name, lora, lambda: progress.advance(task))
        chats = [chat_of(read_provenance(adapter)) for adapter in adapters] or [base.chat]
        for name, chat in zip(names or [""], chats, strict=True):
            modelfile = staging / (f"Modelfile.{name}" if name else "Modelfile")
            modelfile.write_text(_modelfile(base, f"{name}.gguf" if name else "", chat), encoding="utf-8")
        written = sorted(path.name for path in staging.iterdir())
    return [out / name for name in written]


def _write_model(path: Path, base: Base, tensors: list[GgufTensor], kind: str, done: Callable[[], None]) -> None:
    import gguf

    config, vocabulary = base.config, gguf_vocabulary(base.tokenizer, base.config.vocab_size)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(base.name.rstrip("/").rpartition("/")[2] or base.directory.name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(begin_of_text_id(base.tokenizer))
    writer.add_eos_token_id(end_of_text_id(base.tokenizer))
    writer.add_add_bos_token(base.chat != EOS_TURNS)  # a text is continued as training saw it: behind the begin of text
    if isinstance(template := base.tokenizer.chat_template, str):
        writer.add_chat_template(template)
    _write(writer, path, tensors, kind, done)


def _write_lora(path: Path, name: str, tensors: list[GgufTensor], done: Callable[[], None]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # the scale is in B: modules may differ in it, the file has one alpha
    _write(writer, path, tensors, "f32", done)


def _write(writer: Any, path: Path, tensors: list[GgufTensor], kind: str, done: Callable[[], None]) -> None:
    """All tensors, one in memory at a time; then the file is read back and compared with them."""
    from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
    from gguf.quants import quant_shape_to_byte_shape

    kinds = {tensor.name: GGMLQuantizationType[_stored_as(tensor, kind)] for tensor in tensors}
    for tensor in tensors:
        stored = kinds[tensor.name]
        shape = quant_shape_to_byte_shape(tensor.shape, stored)
        dtype = {"F32": np.float32, "F16": np.float16}.get(stored.name, np.uint8)
        writer.add_tensor_info(
            tensor.name, shape if dtype is np.uint8 else tensor.shape, np.dtype(dtype), int(np.prod(shape)), stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(quantize(tensor.values().contiguous().numpy(), kinds[tensor.name]))
        done()
    writer.close()
    read = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for tensor in tensors:
        found, wanted = read[tensor.name], tensor.values().contiguous().numpy()
        stored = kinds[tensor.name]
        values = dequantize(found.data, found.tensor_type).reshape(tensor.shape)
        expected = dequantize(quantize(wanted, stored), stored).reshape(tensor.shape)
        shape = tuple(int(size) for size in reversed(found.shape))
        if found.tensor_type != stored or shape != tensor.shape or not np.array_equal(values, expected):
            raise CheckFailed(f"{path.name}: {tensor.name} read back differs from what was written; check the disk")


def _stored_as(tensor: GgufTensor, kind: str) -> str:
    """Matrices as asked for; vectors, positions and what no block of 32 divides more exactly, as llama.cpp does."""
    if len(tensor.shape) == 1 or tensor.name.startswith("position_embd"):
        return "F32"
    return "F16" if kind == "q8_0" and tensor.shape[-1] % 32 else TYPES[kind]


def _modelfile(base: Base, adapter: str, chat: str | None) -> str:
    """How Ollama continues a text, or a conversation, with this model, up to the end of the text or the turn."""
    lines = [f"FROM ./{MODEL}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    lines += ["TEMPLATE {{ .Prompt }}"] if chat is None else ollama_lines(chat, str(base.tokenizer.eos_token))
    lines += [f"PARAMETER num_ctx {base.config.n_positions}", "PARAMETER temperature 1"]
    return "\n".join(lines) + "\n"
