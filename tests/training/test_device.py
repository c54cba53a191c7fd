"""Precision is chosen by what the processor can do, never by its name."""

from __future__ import annotations

import pytest
import torch

from peftune.errors import UserError
from peftune.training.device import choose_precision

CAPABILITIES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")


@pytest.mark.parametrize(
    ("kind", "able", "wanted"),
    [
        ("AVX512", ["_is_avx512_bf16_supported"], "bf16"),
        ("AVX512", ["_is_amx_tile_supported"], "bf16"),
        ("AVX512", [], "fp32"),
        ("AVX2", [], "fp32"),
        ("DEFAULT", ["_is_arm_bf16_supported"], "bf16"),
        ("SVE256", ["_is_arm_bf16_supported"], "bf16"),
        ("DEFAULT", [], "fp32"),
    ],
)
@pytest.mark.parametrize("asked_of_torch", [True, False])
def test_a_cpu_gets_bf16_where_it_multiplies_it(
    kind: str, able: list[str], wanted: str, asked_of_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds of torch differ in which capabilities they can name; one that is not there counts as absent."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    for name in CAPABILITIES:
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if name in able or asked_of_torch:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in able, raising=False)
    assert choose_precision("auto", on_gpu=False) == wanted
    assert choose_precision("bf16", on_gpu=False) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", on_gpu=False)
