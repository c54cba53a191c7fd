"""What a merge did, how far logits moved, and whether that is close enough to the model that was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftune.errors import CheckFailed
from peftune.model.quantized import MISSING

POSITIONS = 128  # positions whose logits are in memory at a time
_EXACT = 1e-4  # largest logit difference of a float32 merge, for logits up to 32
_ROUNDINGS = 10  # of the measured effect of one rounding of all weights: the merge rounds a few times
_FIGURES = ("max_abs_logit_difference", "mean_kl", "argmax_agreement")
_ROUNDED_KL = {"bfloat16": 0.05, "float16": 0.005}  # nats per token that rounding the weights may cost


@dataclass(frozen=True)
class Difference:
    """Of logits: largest absolute difference, mean KL(reference ‖ candidate) in nats, share of equal argmax."""

    max_abs_logit_difference: float
    mean_kl: float
    argmax_agreement: float
    largest_logit: float
    positions: int


class LogitDiffAccumulator:
    """Running sums over slices of the vocabulary, (n,) for reference and candidate, float64 (an online softmax).

    So no complete softmax is ever in memory.
    """

    def __init__(self, positions: int) -> None:
        self.largest = torch.full((2, positions), -torch.inf, dtype=torch.float64)
        self.argmax = torch.zeros((2, positions), dtype=torch.int64)
        self.total = torch.zeros((2, positions), dtype=torch.float64)
        self.weighted = torch.zeros(positions, dtype=torch.float64)
        self.extremes = torch.zeros(2, dtype=torch.float64)  # of |difference| and |reference|; a NaN is kept

    def add(self, part: slice, first_token: int, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add logits (positions in `part`, slice) of the tokens from `first_token` on."""
        for row, logits in enumerate((reference, candidate)):
            (top, index), largest = logits.max(dim=1), self.largest[row, part]
            self.argmax[row, part] = torch.where(top > largest, index + first_token, self.argmax[row, part])
            new = torch.maximum(top, largest)
            shrink = torch.exp(largest - new)
            terms = torch.exp(logits - new[:, None])
            self.total[row, part] = self.total[row, part] * shrink + terms.sum(dim=1)
            if row == 0:
                self.weighted[part] = self.weighted[part] * shrink + (terms * (reference - candidate)).sum(dim=1)
            self.largest[row, part] = new
        now = torch.stack([(reference - candidate).abs().max(), reference.abs().max()])
        self.extremes = torch.maximum(self.extremes, now)

    def difference(self) -> Difference:
        """KL = E_p[p - q] - log Z_p + log Z_q, per position; rounding below 0 is cut off."""
        log_z = self.total.log() + self.largest
        kl = self.weighted / self.total[0] - log_z[0] + log_z[1]
        mean_kl = sum(max(part.mean().item(), 0.0) * len(part) for part in torch.split(kl, POSITIONS)) / len(kl)
        agreement = (self.argmax[0] == self.argmax[1]).double().mean().item()
        max_abs, largest_logit = self.extremes.tolist()
        return Difference(max_abs, mean_kl, agreement, largest_logit, len(kl))


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how far the logits moved; written as merge.json. Differences are None without verification.

    `float32_max_abs_logit_difference` is that of the merge before its weights were rounded to `dtype` (the same as
    `max_abs_logit_difference` for float32); `rounding_mean_kl` is how far the rounding moved the predictions for the
    text on which logits were compared, in nats per token. What it costs on another text has to be measured there.

    `trained_on` is `int8` or `nf4` for an adapter that was trained on a quantised base; the three figures
    `…_to_trained` then compare with the function that was trained, None where that was not measured.
    `special_tokens` says how they were read where a text spelt them out, `parse` or `text`: so are prompts. `chat` is
    the template of its conversations, None where it was not trained on any.
    """

    modules_in_adapter: int
    modules_applied: int
    dtype: str
    base_fingerprint: str
    adapter_fingerprint: str
    base: str
    tie_word_embeddings: bool
    vocabulary: int
    max_abs_logit_difference: float | None = None
    mean_kl: float | None = None
    argmax_agreement: float | None = None
    tolerance: float | None = None
    largest_logit: float | None = None
    positions: int | None = None
    float32_max_abs_logit_difference: float | None = None
    rounding_mean_kl: float | None = None
    trained_on: str | None = None
    max_abs_logit_difference_to_trained: float | None = None
    mean_kl_to_trained: float | None = None
    argmax_agreement_to_trained: float | None = None
    left_out: tuple[str, ...] = ()
    """Tensors of the base that belong to heads of other tasks: the merged model is a language model without them."""
    special_tokens: str = "text"
    chat: str | None = None
    merged: tuple[dict[str, Any], ...] = ()
    """Every adapter in the model, the last one first: those that the base had merged before too."""
    changes_nothing: bool = False
    """Whether the adapter's update of every weight is zero: the merged model is the base."""
    begin_of_text: str = ""
    """The token behind which every text stood in training."""
    tokenizer_begins_texts: bool = False
    """Whether `tokenizer(text)` of Transformers puts it there."""

    def how_to_call(self) -> str:
        """One line on how other programs get the texts that peftune writes."""
        if self.tokenizer_begins_texts:
            return (
                f"its tokenizer puts {self.begin_of_text} before a text, as in training, so that pipelines and servers "
                "write what peftune generate writes; do not add it once more"
            )
        return (
            f"its tokenizer does not put {self.begin_of_text} before a text, as training did; elsewhere begin each "
            "prompt with this token and nothing else (add_special_tokens=False), else texts differ"
        )

    def summary(self) -> str:
        """One line on how far the merged model is from base + adapter."""
        if self.max_abs_logit_difference is None:
            return "not verified: merge.json says so too"
        return f"read back, against base + adapter: {self._in_words('')}"

    def rounding_summary(self) -> str:
        """One line on what storing it in half precision did."""
        return (
            f"rounding to {self.dtype} moved the predictions for {self.positions} tokens of a probe text by "
            f"{self.rounding_mean_kl:.1e} nats per token (mean KL; before it logits differed by at most "
            f"{self.float32_max_abs_logit_difference:.1e})"
        )

    def quantized_summary(self) -> str:
        """One line on how far the merged model is from the function that was trained on a quantised base."""
        comparison = f"trained on the base in {self.trained_on}: against that + adapter"
        if self.max_abs_logit_difference_to_trained is None:
            return f"{comparison} not measured, {MISSING}"
        return f"{comparison} {self._in_words('_to_trained')}"

    def _in_words(self, to: str) -> str:
        """The three figures of a comparison, by the end of their names."""
        differ, kl, agreement = (getattr(self, f"{name}{to}") for name in _FIGURES)
        return (
            f"logits differ by at most {differ:.1e}, mean KL {kl:.1e} nats per token, the same likeliest token in "
            f"{agreement:.2%}"
        )


def allowed(difference: Difference) -> float:
    """The largest difference of logits in float32 that rounding alone makes in a well-conditioned model."""
    return _EXACT * max(1.0, difference.largest_logit / 32)


def judged(
    dtype: str,
    stored: Difference,
    exact: Difference,
    rounding: Difference | None,
    to_trained: Difference | None,
    weight_rounding: float = 0.0,
) -> dict[str, Any]:
    """What was measured, by the report's names; CheckFailed where the merged model is not the one that was trained.

    `exact` is of the merge before it was rounded to `dtype`. The distance `to_trained`, which is that to quantised
    base + adapter, is reported and never refused. `weight_rounding` is what logits move by, in float64, when every
    weight moves by the half unit in the last place that storing it as float32 may cost.
    """
    tolerance = max(allowed(exact), _ROUNDINGS * weight_rounding)
    if not exact.max_abs_logit_difference <= tolerance:
        raise CheckFailed(
            f"merge: logits differ by {exact.max_abs_logit_difference:.2g} from base + adapter (allowed "
            f"{tolerance:.2g}, largest logit {exact.largest_logit:.3g}); nothing was written"
        )
    if rounding is not None and not stored.mean_kl <= _ROUNDED_KL[dtype]:
        raise CheckFailed(
            f"merge: rounding to {dtype} moves the predictions by a mean KL of {stored.mean_kl:.2g} nats per token on "
            f"{stored.positions} tokens of a probe text (allowed {_ROUNDED_KL[dtype]}); "
            "nothing was written, use float32"
        )
    return {
        **{name: getattr(stored, name) for name in _FIGURES},
        **({f"{name}_to_trained": getattr(to_trained, name) for name in _FIGURES} if to_trained else {}),
        "tolerance": tolerance, "largest_logit": exact.largest_logit, "positions": exact.positions,
        "float32_max_abs_logit_difference": exact.max_abs_logit_difference,
        "rounding_mean_kl": rounding.mean_kl if rounding else None,
    }  # fmt: skip
