"""What cannot be combined is refused before a weight is loaded, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.training.distributed.zero import check_engine_file, refuse_for_zero3


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("quantize=int8", "int8 .8-bit trains to a wrong loss"),
        ("quantize=nf4", "nf4 .*cannot be sharded"),
        ("lora.variant=dora", "lora.variant: dora .it reads full weights"),
        ("lora.variant=pissa", "lora.variant: pissa"),
        ("lora.modules_to_save=[ln_f]", "modules_to_save"),
        ("lora.targets=[c_attn, lm_head]", "targets outside the blocks"),
        ("run.samples=[once]", "no rank has the full model"),
    ],
)
def test_zero3_refuses_what_it_would_train_wrongly(recipe: Callable[..., Recipe], override: str, reason: str) -> None:
    refuse_for_zero3(recipe("run.checkpointing=true", "lora.variant=rslora"))
    with pytest.raises(UserError, match=f"ZeRO-3 cannot be combined with .*{reason}.*use ZeRO-2"):
        refuse_for_zero3(recipe(override))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"optimizer": {"type": "Adam"}}, r"optimizer \(peftune has its own\)"),
        ({"bf16": {"enabled": True}}, r"bf16 \(run.precision says it\)"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps: 4 \(the recipe says it"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0"),
        ([], "holds list, expected an object"),
    ],
)
def test_a_layout_that_decides_what_the_recipe_decides_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason):
        check_engine_file(path)
    path.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}))
    check_engine_file(path)
    with pytest.raises(UserError, match="No such file"):
        check_engine_file(tmp_path / "absent.json")
