"""The loss without logits, the document mask, and what an adapter may touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from peftune.config.recipe import LoraSection
from peftune.errors import UserError
from peftune.model import loss as loss_module
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import inject, stored_adapter
from peftune.model.loss import LossModel, document_mask, summed_nats


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), chunk=st.integers(1, 5), seed=st.integers(0, 99))
def test_chunked_loss_and_gradient_equal_cross_entropy_in_float64(rows: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(6, 11, bias=False).requires_grad_(False)
    hidden = torch.randn(rows, 6, requires_grad=True)
    targets = torch.randint(0, 11, (rows,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "chunk_rows", lambda device: chunk)
        total = summed_nats(hidden, head, targets)
        (total * 0.25).backward()
    exact = hidden.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact @ head.weight.double().T, targets, reduction="sum")
    (wanted * 0.25).backward()
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)


def test_a_trainable_head_gets_its_gradient() -> None:
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(6, 11, bias=False), torch.randn(700, 6), torch.randint(0, 11, (700,))
    summed_nats(hidden, head, targets).backward()
    found, head.weight.grad = head.weight.grad, None
    F.cross_entropy(head(hidden), targets, reduction="sum").backward()
    torch.testing.assert_close(found, head.weight.grad, rtol=1e-5, atol=1e-5)


def test_the_mask_is_causal_within_a_document_and_closed_between_documents() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    seen = {(i, j) for i, j in mask.nonzero().tolist()}
    assert seen == {(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3), (4, 4)}


@pytest.mark.parametrize("neftune", [0.0, 5.0])
def test_rows_of_one_document_need_no_mask(tiny_base: Path, neftune: float) -> None:
    """No mask lets SDPA take its causal kernel, which sums in another order: 1e-6."""
    scorer = LossModel(load_model(Base(tiny_base)), neftune).train()
    ids, positions = torch.randint(0, 299, (3, 64)), torch.arange(64).expand(3, 64)
    targets = ids.roll(-1, dims=1)
    scored = []
    for segments in (torch.zeros_like(ids), None):
        torch.manual_seed(0)
        scored.append(scorer(ids, positions, targets, segments))
    torch.testing.assert_close(*scored, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_editing_one_document_moves_no_other_documents_logits(tiny_base: Path, implementation: str) -> None:
    model = load_model(Base(tiny_base))
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10)] * 3)[None]
    segments = torch.arange(3).repeat_interleave(10)[None]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        additive = torch.zeros(1, 1, 30, 30).masked_fill(~document_mask(segments), -torch.inf)
        mask = document_mask(segments) if implementation == "sdpa" else additive
        return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]

    edited = ids.clone()
    edited[0, 10:20] = torch.randint(0, 300, (10,), generator=torch.Generator().manual_seed(1))
    before, after = logits(ids), logits(edited)
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[20:], after[20:])
    assert not torch.equal(before[10:20], after[10:20])
    torch.testing.assert_close(before[20:], model(ids[:, 20:]).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_row_scores_what_its_documents_score_alone(tiny_base: Path) -> None:
    scorer = LossModel(load_model(Base(tiny_base)))
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 300, (n,), generator=generator) for n in (5, 17, 2, 30)]
    alone = sum(
        float(scorer(d[None], torch.arange(len(d))[None], _targets(d)[None], torch.zeros_like(d)[None]))
        for d in documents
    )
    row = [torch.cat(documents)[None], torch.cat([torch.arange(len(d)) for d in documents])[None],
           torch.cat([_targets(d) for d in documents])[None],
           torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]]  # fmt: skip
    np.testing.assert_allclose(float(scorer(*row)), alone, rtol=1e-6)


def _targets(document: torch.Tensor) -> torch.Tensor:
    return torch.cat([document[1:], torch.tensor([-100])])


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_a_fresh_adapter_changes_nothing_and_its_stored_form_is_plain_peft(
    tiny_base: Path, tmp_path: Path, variant: str
) -> None:
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file

    from peftune.model.lora import quiet_peft

    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted = load_model(Base(tiny_base))(ids).logits
    adapted = inject(load_model(Base(tiny_base)), LoraSection(rank=4, alpha=8, variant=variant), seed=3)
    torch.testing.assert_close(adapted.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.trainable().items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trained = adapted.model.eval()(input_ids=ids).logits
    config, tensors = stored_adapter(adapted)
    assert config["fan_in_fan_out"] is True
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    LoraConfig(**{k: v for k, v in config.items() if k in LoraConfig.__dataclass_fields__}).save_pretrained(tmp_path)
    with quiet_peft():
        plain = PeftModel.from_pretrained(load_model(Base(tiny_base)), tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_attention_targets_leave_the_mlp_alone(tiny_base: Path) -> None:
    names = inject(load_model(Base(tiny_base)), LoraSection(targets="attention", layers=[1]), seed=0).trainable()
    assert names and all(".h.1.attn." in name for name in names)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSection(targets=["q_proj"]), "no linear or embedding module 'q_proj'"),
        (LoraSection(layers=[0, 7]), "blocks 0 to 1, found 7"),
        (LoraSection(modules_to_save=["head"]), "no module 'head'"),
        (LoraSection(targets=["lm_head"], layers=[0]), "lm_head lies outside the blocks"),
        (LoraSection(targets=["wte"], modules_to_save=["wte"]), "both in targets and in modules_to_save"),
        (LoraSection(targets=["ln_1"]), "no linear or embedding module 'ln_1'"),
    ],
)
def test_targets_that_the_base_lacks_are_refused(tiny_base: Path, lora: LoraSection, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(load_model(Base(tiny_base)), lora, seed=0)
