"""Beam search, which is Transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftune.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from peftune.inference.decode import Model


def search(model: Model, context: list[int], end: int, settings: GenerationSettings) -> list[int]:
    """The tokens of the best beam after `context`, with the `end` that ended it, if one did.

    Every setting is given here, so that nothing in a checkpoint's generation_config.json changes the search.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        num_beams=settings.beams,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=float(settings.repetition_penalty),
        do_sample=False,
        num_return_sequences=1,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=end,
    )
    ids = torch.tensor([context], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[misc]
    written: list[int] = output[0, len(context) :].tolist()
    return written[: written.index(end) + 1] if end in written else written
