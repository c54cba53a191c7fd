"""GPT-2 as it is served equals Transformers' GPT-2, and its products do not depend on how many rows there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.model.base import Base
from peftune.model.decode import packed_linear
from peftune.model.decode.build import ModelSpec, build
from peftune.model.decode.packed_linear import PackedLinear
from peftune.model.load import load_model

CPU = torch.device("cpu")
# two of GPT-2 small's, one of xl's, and what is no multiple of anything
SHAPES = [(768, 2304), (3072, 768), (6400, 1600), (37, 53)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "packed"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_a_row_of_a_product_is_the_same_to_the_bit_among_any_number_of_rows(
    dtype: torch.dtype, shape: tuple[int, int], packed: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing can be packed, as on a processor without bf16."""
    random = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(shape[1], shape[0], generator=random)).to(dtype)
    bias, x = torch.randn(shape[1], generator=random), torch.randn(40, shape[0], generator=random)
    if not packed:
        monkeypatch.setattr(packed_linear, "_can_pack", lambda _: False)
    linear = PackedLinear(weight, bias)
    full = linear(x)
    for rows in (1, 2, 7, 33):
        assert torch.equal(linear(x[:rows]), full[:rows]), rows
        assert torch.equal(linear(x[-rows:]), full[-rows:]), rows
    exact = x.to(dtype).double() @ weight.double().T + bias.to(dtype).double()
    assert float((full - exact).norm() / exact.norm()) < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"n_inner": 48, "layer_norm_epsilon": 1e-3},
    ],
)
def test_prefill_and_decode_give_the_logits_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_positions=96, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, **changes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    weights, spec = Base(tmp_path).weights, ModelSpec(Base(tmp_path).config, torch.float32, CPU)
    model, cache, slots = build(spec, weights.tensor, weights.tied), spec.kv_cache(4), [2, 0, 3]
    ids = torch.randint(0, 90, (3, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load_model(Base(tmp_path))(ids).logits
        full = model.prefill(ids, 0, None, slots, {})
        parts = [model.prefill(ids[:, :64], 0, cache, slots, {}), model.prefill(ids[:, 64:80], 64, cache, slots, {})]
        parts += [model.decode(ids[:, at], [at] * 3, cache, slots, {})[:, None] for at in range(80, 96)]
        for hidden in (full, torch.cat(parts, dim=1)):
            torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=2e-5)


def test_rows_at_positions_of_their_own_decode_as_each_does_alone(tiny_base: Path) -> None:
    weights, spec = Base(tiny_base).weights, ModelSpec(Base(tiny_base).config, torch.float32, CPU)
    model, cache, lengths = build(spec, weights.tensor, weights.tied), spec.kv_cache(3), [5, 31, 16]
    ids = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model.prefill(ids[:, :32], 0, cache, [0, 1, 2], {})
        together = model.decode(ids[range(3), lengths], lengths, cache, [0, 1, 2], {})
        for row, length in enumerate(lengths):
            own = spec.kv_cache(1)
            model.prefill(ids[row : row + 1, :32], 0, own, [0], {})
            alone = model.decode(ids[row : row + 1, length], [length], own, [0], {})
            assert torch.equal(alone[0], together[row])
