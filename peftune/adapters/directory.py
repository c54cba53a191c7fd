"""The adapter directory: read it, refuse what is broken, write it atomically, put it on a model.

`adapter_config.json` and `adapter_model.safetensors` are plain PEFT; `peftune.json` says where the adapter came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters import peft_config
from peftune.adapters.layout import AdapterLayout, changes_base, layout_of, plain_name
from peftune.adapters.provenance import read_provenance, recorded_base
from peftune.errors import CheckFailed, UserError, first_line
from peftune.files import flush_to_disk, read_object, staging_directory
from peftune.model.fingerprint import bytes_of
from peftune.model.lora import quiet_peft
from peftune.model.weights import all_finite, load_pickle, save_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PROVENANCE = "peftune.json"
_COMMIT = ".commit"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: PEFT's configuration, its tensors by PEFT's names, and what peftune.json says."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    provenance: dict[str, Any] | None

    @property
    def base(self) -> str | None:
        """The name of the base that it records, or None."""
        return recorded_base(self.config, self.provenance)

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings that change what it computes, and of its tensors."""
        kept = {key: value for key, value in self.config.items() if key not in peft_config.WITHOUT_EFFECT}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}|{list(tensor.shape)}|{tensor.dtype}\n".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter directory, of peftune's or of plain PEFT's making (`.bin` too).

    Raises UserError where a file is missing, broken or cut short, where it is not a LoRA, and where a tensor is
    empty or holds values that are not finite.
    """
    config = read_config(directory)
    tensors = _read_tensors(directory)
    if not tensors:
        raise UserError(f"adapter {directory}: holds no tensors; train it again")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            problem = f"has shape {tuple(tensor.shape)}: it was saved without gathering ZeRO-3 parts"
        elif not tensor.is_floating_point():
            problem = f"holds {tensor.dtype}; expected floating-point numbers"
        elif not all_finite(tensor):
            problem = "holds values that are not finite; the training went wrong"
        else:
            continue
        raise UserError(f"adapter {directory}: {name} {problem}")
    return Adapter(directory, config, tensors, read_provenance(directory))


def load_onto(model: GPT2LMHeadModel | PeftModel, adapter_dir: Path, name: str = "default") -> PeftModel:
    """Put an adapter on a base (or beside others on a PeftModel) under `name`, frozen, through PEFT's own loading.

    PEFT makes the name a part of parameter names, so names with dots or dashes (`poems-v1.5`) are not valid.
    Raises UserError where the adapter does not fit: modules, blocks or shapes that the base does not have, tensors
    that are missing or left over, a name that is taken, or settings that would change the base under other adapters.
    """
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter, layout = check_fits(adapter_dir, core.config)
    if isinstance(model, PeftModel):
        _check_compatible(model, adapter, name)
    _check_embedding(adapter, core)
    # Loading with low memory assigns tensors instead of copying them: tied tensors of the base would become untied.
    low_memory = not changes_base(adapter.config) and not layout.replaced
    options: dict[str, Any] = {"low_cpu_mem_usage": low_memory, "torch_device": "cpu"}
    with quiet_peft():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter_dir), name, **options)
            else:
                model = PeftModel.from_pretrained(model, str(adapter_dir), name, **options)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"adapter {adapter_dir}: PEFT cannot load it: {first_line(error)}") from None
        loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # PEFT only warns about names that it does not know, so what it holds now is compared with the file
    tensors = {plain_name(key): tensor for key, tensor in adapter.tensors.items()}
    for key, tensor in loaded.items():
        stored = tensors.get(plain_name(key))
        if stored is None or not torch.equal(stored.to(tensor.dtype), tensor.detach().cpu()):
            raise CheckFailed(f"adapter {adapter_dir}: {key} did not arrive in the model as it is in the file")
    return model


def check_fits(adapter_dir: Path, base: GPT2Config) -> tuple[Adapter, AdapterLayout]:
    """What an adapter holds and what it changes, if it can be put on a base of this shape; UserError if not."""
    adapter = read_adapter(adapter_dir)
    layout = layout_of(adapter.config, adapter.tensors, base, str(adapter_dir))
    if layout.vocabulary != base.vocab_size:
        raise UserError(
            f"adapter {adapter_dir}: has {layout.vocabulary} tokens, the base has {base.vocab_size}; "
            "fold it in with peftune merge first"
        )
    return adapter, layout


def _check_compatible(model: PeftModel, adapter: Adapter, name: str) -> None:
    if name in model.peft_config:
        raise UserError(f"adapter {adapter.directory}: the name {name} is already taken; give it another")
    configs = [adapter.config, *(config.to_dict() for config in model.peft_config.values())]
    if any(changes_base(config) for config in configs):
        raise UserError(
            f"adapter {adapter.directory}: one of {', '.join([*model.peft_config, name])} changes the base itself "
            "(PiSSA, or trained biases), so it cannot share it; fold that one in with peftune merge"
        )


def _check_embedding(adapter: Adapter, core: Any) -> None:
    """PEFT stores the embedding beside an adapter of lm_head, and writes it into the base on loading."""
    for name, tensor in adapter.tensors.items():
        if name.endswith(".base_layer.weight") and not changes_base(adapter.config):
            embedding = core.get_output_embeddings().weight.detach().cpu()
            if not torch.equal(embedding, tensor.to(embedding.dtype)):
                raise UserError(
                    f"adapter {adapter.directory}: {name} is not the embedding of this base; "
                    "pass the base that it was trained on, or fold it in with peftune merge"
                )


def check_free(out: Path, what: str) -> None:
    """Refuse a directory that is there already, or whose name cannot be; `what` is to be written there."""
    try:
        taken = out.exists() or out.is_symlink()
    except OSError as error:  # a name that is too long
        raise UserError(f"{str(out)[:200]}: cannot write {what}: {error.strerror or error}") from None
    if taken:
        raise UserError(f"{out}: exists already and is not overwritten; choose another directory or remove it")


def write_adapter(
    out: Path, config: dict[str, Any], tensors: Tensors, provenance: dict[str, Any], files: Mapping[str, bytes | str]
) -> None:
    """Write an adapter directory atomically: to a staging directory, read back and compared, then renamed.

    An adapter that is there already is replaced; other files (metrics, checkpoints) stay. A crash before the commit
    leaves the old state, a crash after it is finished by the next reader; in between there is no `adapter_config.json`,
    so nobody loads a mixture. Raises UserError where the disk is full or not writable, CheckFailed where what was
    read back differs.
    """
    existed = out.exists()
    if existed and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a directory for the adapter")
    target = out / _COMMIT if existed else out
    try:
        _finish_commit(out)
        with staging_directory(target) as staging:
            texts = {CONFIG: json.dumps(config, indent=2, sort_keys=True), PROVENANCE: json.dumps(provenance, indent=2)}
            _write_files(staging, tensors, {**files, **texts})
            read = read_adapter(staging)
            same = read.config == json.loads(json.dumps(config)) and read.tensors.keys() == tensors.keys()
            if not same or not all(_identical(stored, tensors[name]) for name, stored in read.tensors.items()):
                raise CheckFailed(f"{out}: the adapter read back differs from what was written; check the disk")
            staging.rename(target)
        _finish_commit(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write the adapter: {error.strerror or error}") from None


def _write_files(directory: Path, tensors: Tensors, files: Mapping[str, bytes | str]) -> None:
    save_tensors(tensors, directory / TENSORS)
    for name, content in files.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    flush_to_disk(directory)


def _identical(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    return stored.dtype == tensor.dtype and torch.equal(stored, tensor.detach().cpu())


def _finish_commit(out: Path) -> None:
    """Move the files of a complete write into `out`; `adapter_config.json` is removed first and comes last.

    Can be repeated.
    """
    commit = out / _COMMIT
    if not commit.is_dir():
        return
    try:
        if (commit / CONFIG).is_file():  # else only its removal is left to do
            (out / CONFIG).unlink(missing_ok=True)
            last = commit / CONFIG
            for path in [p for p in sorted(commit.iterdir()) if p != last] + [last]:
                path.replace(out / path.name)
        shutil.rmtree(commit)
    except FileNotFoundError:
        return  # another process finished it at the same moment
    except OSError as error:
        raise UserError(f"{out}: an unfinished write cannot be completed: {error.strerror or error}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration, checked; UserError where it is missing, broken or not that of a LoRA."""
    check_directory(directory, f"adapter {directory}", f"; expected a directory with {CONFIG}")
    _finish_commit(directory)
    path = directory / CONFIG
    if not path.is_file():
        hints = {
            "config.json": "it is a complete model; pass it as the base",
            "checkpoints": "its training has not finished",
        }
        hint = "".join(f"; {hint}" for name, hint in hints.items() if (directory / name).exists())
        raise UserError(f"adapter {directory}: no {CONFIG} in this directory{hint}")
    config = read_object(path, f"adapter {directory}: {CONFIG}")
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {directory}: peft_type is {config.get('peft_type')}, peftune works with LORA only")
    peft_config.check(config, f"adapter {directory}: {CONFIG}")
    return config


def check_directory(directory: Path, name: str, hint: str = "") -> None:
    """UserError, in which the directory is called `name`, where it cannot be listed."""
    try:
        os.scandir(directory).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{name[:200]}: {getattr(error, 'strerror', None) or error}{hint}") from None


def _read_tensors(directory: Path) -> Tensors:
    path, pickled = directory / TENSORS, directory / "adapter_model.bin"
    if not path.is_file():
        if pickled.is_file():
            return load_pickle(pickled)
        raise UserError(f"adapter {directory}: no {TENSORS} in this directory; copy the complete adapter")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        cause = first_line(error)
        raise UserError(f"adapter {directory}: {TENSORS} is not a complete safetensors file: {cause}") from None
