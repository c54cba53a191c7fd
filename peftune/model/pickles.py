"""Files of torch.save, read as data: plain values and tensors, and never any code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from peftune.errors import UserError


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, memory-mapped where its format allows, and never any code.

    Raises UserError for a broken file, and for one that holds anything but tensors.
    """
    return checked_tensors(unpickle(file), file)


def unpickle(file: Path) -> Any:
    """What a file of torch.save holds, if that is plain values and tensors; no code of it runs, or UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its protocol, its storages and its alphabet
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError) as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # written before torch 1.6
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever torch's reader makes of bytes that somebody else chose
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{file}: not a whole weights-only file ({cause}); copy or download it again") from None


def checked_tensors(state: Any, file: Path) -> dict[str, torch.Tensor]:
    """`state`, if it maps names to plain tensors no larger than the file that they came from; else UserError."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{file}: expected a mapping of names to tensors")
    size = file.stat().st_size
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.nbytes > size:
            raise UserError(f"{file}: {name[:80]} is no plain tensor whose values are in the file; save it again")
    return state
