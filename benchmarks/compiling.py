"""What torch.compile would bring a step: its elementwise pieces, as they are and compiled, and the seconds to compile.

    python -m benchmarks.compiling [--rows 2048] [--rounds 9]

LayerNorm with its cast, GELU, and the softmax of the head's loss for one chunk, of GPT-2 small's shapes in bf16,
forward and backward, in turns. Everything else of a step is matrix products, which no compiler makes faster.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import Result, Row, Spread, finish, spread
from benchmarks.options import parse, parser

_WIDTH, _VOCABULARY, _CHUNK = 768, 50257, 128


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The fp32 stream, normalised, in bf16."""
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5).to(torch.bfloat16)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's activation."""
    return F.gelu(x, approximate="tanh")


def softmax(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a chunk and its gradient for the logits (rows, V)."""
    top, p = logits.amax(1, keepdim=True).float(), torch.softmax(logits, dim=1, dtype=torch.float32)
    log_z = top - p.amax(1, keepdim=True).log()
    gradient = p.scatter_add(1, chosen, torch.full_like(top, -1))
    return (log_z - logits.gather(1, chosen).float()).sum(dtype=torch.float64), gradient.to(torch.bfloat16)


def run(arguments: Namespace) -> Result:
    """Compile each piece, then take turns."""
    x = torch.randn(arguments.rows, _WIDTH, requires_grad=True)
    hidden = torch.randn(arguments.rows, 4 * _WIDTH, dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(_CHUNK, _VOCABULARY, dtype=torch.bfloat16)
    pieces: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "LayerNorm and cast": (norm, (x, torch.ones(_WIDTH), torch.zeros(_WIDTH))),
        "GELU": (gelu, (hidden,)),
        "softmax of the head": (softmax, (logits, torch.randint(0, _VOCABULARY, (_CHUNK, 1)))),
    }
    result = Result("compile", "elementwise pieces of a step, compiled", {"rows": arguments.rows, "shape": "small"})
    for name, (piece, given) in pieces.items():
        compiled = torch.compile(piece, dynamic=piece is not softmax)
        began = time.perf_counter()
        _once(compiled, given)
        seconds = time.perf_counter() - began
        _once(piece, given)
        times = [(_once(piece, given), _once(compiled, given)) for _ in range(arguments.rounds)]
        before, after = (spread([pair[i] * 1e3 for pair in times]) for i in (0, 1))
        each = [a / b for a, b in times]
        gain = Spread(before.median / after.median, min(each), max(each))
        told = f"{before.median:.1f} ms against {after.median:.1f}; compiled in {seconds:.0f} s"
        result.rows.append(Row("compile", name, "as it is", gain, 0, "information", reason=told))
    return result


def _once(piece: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    found = piece(*given)
    if given[0].requires_grad:
        found.backward(torch.ones_like(found))
    return time.perf_counter() - start


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, rounds=9)
    made.add_argument("--rows", type=int, default=2048, help="tokens of a step")
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
