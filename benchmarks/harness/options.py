"""Options that benchmarks share, and what they lead to: a base of random weights, documents, jobs for contestants."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import corpus, shapes
from benchmarks.harness.peers import PEERS, Peer, chosen
from benchmarks.harness.report import Result, finish
from benchmarks.harness.workers import Contestant, interleave

QUICK: dict[str, Any] = {
    "shape": "tiny", "documents": 48, "mean": 40.0, "longest": 96, "block": 96, "rounds": 2, "warmup": 1, "tokens": 300,
    "batch": 2, "megabytes": 0.5, "gate_blocks": 1, "many": 9, "new": 8, "requests": 16, "cycles": 20, "adapters": 2,
    "layers": 2, "width": 64, "sizes": [0.5], "steps": 1,
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "shape": {"type": shapes.shape_argument, "default": shapes.PRESETS["small"],
              "help": f"{', '.join(shapes.PRESETS)}, or LAYERS,WIDTH,HEADS[,VOCABULARY]; weights are random"},
    "tokenizer": {"default": "builtin:small", "metavar": "DIR",
                  "help": "directory of a GPT-2 tokenizer; default: peftune's own, under the shape's vocabulary"},
    "data": {"metavar": "FILE", "help": "text to cut documents from (default: peftune's built-in corpora)"},
    "rounds": {"type": int, "default": 5, "help": "rounds that count; contestants take turns in each"},
    "warmup": {"type": int, "default": 1, "help": "rounds before, which do not count"},
    "threads": {"type": int, "help": "threads of each contestant (default: the libraries' own choice)"},
    "device": {"choices": ["auto", "cpu", "cuda"], "default": "auto", "help": "auto: a GPU where there is one"},
    "seed": {"type": int, "default": 0},
    "work": {"type": Path, "help": "keep base and documents here and use them again (default: temporary)"},
    "json": {"type": Path, "help": "also write everything, every round, as JSON"},
    "quick": {"action": "store_true", "help": "a tiny shape and few rounds: does it run, not how fast"},
}  # fmt: skip
ADAPTER: dict[str, dict[str, Any]] = {
    "rank": {"type": int, "default": 8},
    "targets": {"default": "c_attn", "help": "all, attention, or module names with commas (default c_attn)"},
}
TRAINING: dict[str, dict[str, Any]] = ADAPTER | {
    "documents": {"type": int, "default": 400, "help": "documents in the corpus"},
    "mean": {"type": float, "default": 185.0, "help": "mean tokens of a document; inf: all are --longest"},
    "longest": {"type": int, "default": 512, "help": "most tokens of a document, both <|endoftext|> included"},
    "block": {"type": int, "default": 512, "help": "peftune's data.block_size"},
    "batch": {"type": int, "default": 8, "help": "our blocks per step, and documents of peers without a setting"},
    "tokens": {"type": int, "default": 4000, "help": "real tokens of a round at least; rounds end with a step"},
    "alpha": {"type": float, "default": 16},
    "ours": {"action": "append", "default": [], "metavar": "KEY=VALUE",
             "help": "recipe key of ours, such as run.precision=fp32"},
    "peers": {"default": "", "help": f"with commas, of {', '.join(PEERS)}"},
    "tune": {"action": "append", "default": [], "metavar": "NAME:KEY=VALUE", "help": "another setting of a peer"},
    "peer": {"action": "append", "default": [], "metavar": "JSON", "help": "one more peer, fields as in peers.Peer"},
    "gate-blocks": {"type": int, "default": 2, "help": "blocks whose gradients are compared first; 0: no gate"},
}  # fmt: skip
FULL_BLOCKS = {"mean": math.inf}


@dataclass(frozen=True)
class Benchmark:
    """One command: its docstring is the help; `options` come on top of the common ones, `defaults` change any."""

    run: Callable[[Setup], Result]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


def main(module: str, benchmarks: dict[str, Benchmark], argv: list[str] | None = None) -> None:
    """`python -m benchmarks.MODULE NAME …`: measure, print, write."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="|".join(benchmarks))
    for name, benchmark in benchmarks.items():
        description = inspect.getdoc(benchmark.run) or ""
        command = commands.add_parser(
            name,
            description=description,
            help=description.splitlines()[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        options = COMMON | benchmark.options
        for option, settings in options.items():
            command.add_argument(f"--{option}", **settings)
        command.set_defaults(**benchmark.defaults)
        if "--quick" in given:  # changes defaults only, so what is given beside it counts
            kept = {"mean"} if command.get_default("mean") == math.inf else set()
            known = {option.replace("-", "_") for option in options} - kept
            command.set_defaults(**{key: value for key, value in QUICK.items() if key in known})
    arguments = parser.parse_args(given)
    try:
        arguments.chosen_peers = chosen(arguments.peers, arguments.tune, arguments.peer) if "peers" in arguments else []
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    with prepared(arguments) as setup:
        result = benchmarks[arguments.name].run(setup)
    finish(result, arguments.json)


def target_modules(text: str) -> list[str]:
    """Module names for PEFT."""
    everything = {"all": ["c_attn", "c_proj", "c_fc"], "attention": ["attn.c_attn", "attn.c_proj"]}
    return everything.get(text) or text.split(",")


@dataclass
class Setup:
    """What contestants of one command share."""

    arguments: argparse.Namespace
    root: Path
    base: Path
    documents: Path
    lengths: list[int]
    load: float
    """Load average of the machine before anything was measured."""

    def environment(self) -> dict[str, str]:
        """Of every contestant: the same threads, no hub, a cache of its own."""
        threads = self.arguments.threads
        counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} if threads else {}
        switches = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.arguments.device == "cpu" else {}
        return counts | switches | hidden | {"PEFTUNE_CACHE": str(self.root / "cache")}

    def interleave(self, contestants: list[Contestant], at_once: bool = True) -> None:
        """Rounds in turns, as many as the options say."""
        interleave(contestants, self.arguments.rounds, self.arguments.warmup, self.environment(), at_once)

    def recipe(self, **changed: Any) -> dict[str, Any]:
        """Of ours, on these documents; every step like the first."""
        a = self.arguments
        targets = a.targets if a.targets in ("all", "attention") else a.targets.split(",")
        return {
            "base": str(self.base),
            "data": {"train": str(self.documents), "validation": 0, "block_size": a.block, "join": ""},
            "lora": {"rank": a.rank, "alpha": a.alpha, "targets": targets},
            "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0, "steps": 1_000_000},
            "batch": {"global_size": a.batch},
            "run": {"out": str(self.root / "adapter"), "seed": a.seed, "eval_every": 0, "save_every": 0},
            **changed,
        }

    def ours(
        self, name: str = "peftune", overrides: tuple[str, ...] = (), must_run: bool = True, **changed: Any
    ) -> Contestant:
        """peftune; overrides of the command come after those of the target."""
        given = [*overrides, *self.arguments.ours, f"run.out={self.root / name.replace(' ', '-')}"]
        job = {"recipe": self.recipe(**changed), "overrides": given, "tokens": self.arguments.tokens}
        return Contestant(name, "benchmarks.harness.ours", job, "tok/s", must_run)

    def peer(self, peer: Peer) -> Contestant:
        """A peer on the same base and documents with the same adapter."""
        a = self.arguments
        lora = {"rank": a.rank, "alpha": a.alpha, "targets": target_modules(a.targets)}
        job = {
            "peer": {"name": peer.name, **peer.settings()}, "base": str(self.base), "documents": str(self.documents),
            "lora": lora, "tokens": a.tokens, "batch": a.batch, "device": a.device, "seed": a.seed,
        }  # fmt: skip
        return Contestant(peer.name, "benchmarks.harness.peer_loop", job, "tok/s")

    def adapters(self, count: int) -> list[str]:
        """Directories of so many random adapters of this base."""
        from benchmarks.harness.bases import make_adapter

        a = self.arguments
        directories = [self.root / f"adapter-{number}" for number in range(count)]
        for directory in directories:
            make_adapter(directory, self.base, a.rank, target_modules(a.targets))
        return [str(directory) for directory in directories]

    def settings(self, **more: Any) -> dict[str, Any]:
        """What was compared on what, to be printed with the figures."""
        a = self.arguments
        found = {"shape": str(a.shape), "weights": "random", "tokenizer": self._tokenizer(), "rounds": a.rounds}
        found |= {"load average before": round(self.load, 2)}
        found |= {"warm-up rounds": a.warmup, "threads": a.threads or "default", "seed": a.seed}
        if self.lengths:
            found |= {"documents": {**corpus.statistics_of(self.lengths), "sha256": corpus.digest(self.documents)}}
            found |= {"tokens a round": a.tokens, "ours": a.ours or "defaults"}
        if "rank" in a:
            found |= {"adapter": f"rank {a.rank} on {a.targets}"}
        return found | more

    def _tokenizer(self) -> str:
        if self.arguments.tokenizer != "builtin:small":
            return Path(self.arguments.tokenizer).name
        rows = self.arguments.shape.vocabulary
        return f"builtin:small: ids are of its 4,096 tokens, the embedding and the head have {rows:,} rows"


@contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Setup]:
    """Base and documents of a command, in `--work` or in a temporary directory."""
    import torch

    from benchmarks.harness.bases import base_of_shape
    from peftune.model.base import Base, open_base

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="peftune-bench-") as scratch:
        root = Path(arguments.work or scratch).absolute()
        root.mkdir(parents=True, exist_ok=True)
        os.environ["PEFTUNE_CACHE"] = str(root / "cache")
        if "base" in arguments:
            base = open_base(arguments.base).directory
        else:
            base = base_of_shape(root, arguments.shape, arguments.tokenizer, arguments.seed)
        documents, lengths = root / "documents.jsonl", []
        prompted = getattr(arguments, "prompted", 0.0)
        if "documents" in arguments:
            print("cutting documents", file=sys.stderr)
            documents = root / f"documents-{arguments.mean:g}-{arguments.longest}-{prompted:g}.jsonl"
            lengths = corpus.write_documents(
                documents, Base(base).tokenizer, arguments.documents, arguments.mean, arguments.longest,
                arguments.data, arguments.seed, prompted,
            )  # fmt: skip
        yield Setup(arguments, root, base, documents, lengths, load)


def fresh(directory: Path) -> Path:
    """An empty directory of this name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
