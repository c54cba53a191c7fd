"""B7: from one adapter to another, in memory and from disk, against PEFT's `set_adapter` and `hotswap_adapter`.

    python -m benchmarks.swapping [--shape small] [--rank 8] [--targets c_attn]

Milliseconds a swap. In memory: `AdapterBank.use` and what the next batch does because of it, for a batch of one
adapter (nothing is copied) and for a slot of a mixed batch (its A and B are copied into the stacks). From disk:
`AdapterBank.add` and `remove`, with all that is checked: the base's fingerprint, every name, shape and value.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks.machine import versions
from benchmarks.measure import Result, Row, finish, ratio, spread
from benchmarks.options import add_adapter, parse, parser, prepared, targets_of
from benchmarks.rounds import Channel, Contestant, interleave

_SWAPS = 200


def serve(job: dict[str, Any], channel: Channel) -> None:
    """One round is many swaps there and back; the value is milliseconds of one."""
    ways = {"use": _use, "slot": _slot, "add": _add, "set_adapter": _set_adapter, "hotswap": _hotswap}
    swap = ways[job["way"]](job)
    channel.ready(settings={"way": job["way"]})
    for _ in channel.rounds():
        start = time.perf_counter()
        for number in range(_SWAPS):
            swap(number % 2)
        channel.answer((time.perf_counter() - start) / _SWAPS * 1e3)


Swap = Callable[[int], object]


def _bank(job: dict[str, Any]) -> Any:
    from peftune.inference.bank import AdapterBank

    bank = AdapterBank(job["base"], device="cpu")
    for number, directory in enumerate(job["adapters"]):
        bank.add(f"a{number}", directory)
    return bank


def _use(job: dict[str, Any]) -> Swap:
    from peftune.model.decode.lora_slots import AdapterSlots

    bank, stacks = _bank(job), AdapterSlots(1)

    def swap(number: int) -> object:
        bank.use(f"a{number}")
        return stacks.factors([0], [bank.variant(f"a{number}").lora])

    return swap


def _slot(job: dict[str, Any]) -> Swap:
    import torch

    from peftune.model.decode.lora_slots import AdapterSlots

    bank, stacks = _bank(job), AdapterSlots(2)
    both = [bank.variant(f"a{number}").lora for number in (0, 1)]
    return torch.inference_mode()(lambda number: stacks.factors([0, 1], [both[number], both[1 - number]]))


def _add(job: dict[str, Any]) -> Swap:
    bank = _bank(job)

    def swap(number: int) -> object:
        bank.remove(f"a{number}")
        return bank.add(f"a{number}", job["adapters"][number])

    return swap


def _peft_model(job: dict[str, Any]) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"]), job["adapters"][0], "a0")
    model.load_adapter(job["adapters"][1], "a1")
    return model.eval()


def _set_adapter(job: dict[str, Any]) -> Swap:
    model = _peft_model(job)
    return lambda number: model.set_adapter(f"a{number}")


def _hotswap(job: dict[str, Any]) -> Swap:
    from peft.utils.hotswap import hotswap_adapter

    model = _peft_model(job)
    return lambda number: hotswap_adapter(model, job["adapters"][number], "a0", torch_device="cpu")


def run(arguments: Namespace) -> Result:
    """Two adapters, rounds, rows."""
    from benchmarks.merge_memory import make_adapters

    with prepared(arguments) as setup:
        made = make_adapters(setup.root, arguments.shape.config(), arguments.rank, targets_of(arguments.targets), 2)
        adapters = [str(directory) for directory in made]
        names = {"use": "in memory", "slot": "in memory, two slots", "add": "from disk",
                 "set_adapter": "PEFT set_adapter", "hotswap": "PEFT hotswap_adapter"}  # fmt: skip
        everyone = {
            way: Contestant(
                name, "benchmarks.swapping", {"way": way, "base": str(setup.base), "adapters": adapters}, "ms",
                must_run=not name.startswith("PEFT"),
            )
            for way, name in names.items()
        }  # fmt: skip
        interleave(list(everyone.values()), arguments.rounds, arguments.warmup, setup.environment())
        adapter = {"adapters": f"rank {arguments.rank} on {arguments.targets}"}
        result = Result("B7", "from one adapter to another", {**setup.told(), **adapter})
    result.add(list(everyone.values()))
    peft = versions().get("peft", "?")
    use, slot, add, set_adapter, hotswap = everyone.values()
    result.rows = [
        Row("B7", "swap in memory", "the clock", spread(use.values()), 0.1, "at most", "ms"),
        Row("B7", "swap from disk, checked", "the clock", spread(add.values()), 0.5, "at most", "ms"),
        Row("B7", "swap of two slots of a mixed batch", "the clock", spread(slot.values()), 0, "information", "ms"),
        Row("B7", "swap in memory", f"PEFT {peft} set_adapter", ratio(set_adapter, use), 0, "information",
            reason=set_adapter.failure or ""),
        Row("B7", "swap from disk", f"PEFT {peft} hotswap_adapter", ratio(hotswap, add), 0, "information",
            reason=hotswap.failure or ""),
    ]  # fmt: skip
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, rounds=3)
    add_adapter(made)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
