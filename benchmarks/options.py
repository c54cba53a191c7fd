"""Options that targets share, and what they lead to: a base of random weights, documents, jobs for contestants."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import corpus, shapes
from benchmarks.peers import PEERS, Peer, chosen
from benchmarks.rounds import Contestant
from benchmarks.shapes import Shape

QUICK: dict[str, Any] = {
    "shape": "tiny", "documents": 48, "mean": 40.0, "longest": 96, "block": 96, "rounds": 2, "warmup": 1, "tokens": 300,
    "batch": 2, "megabytes": 0.5, "gate_blocks": 1,
}  # fmt: skip


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every target has; `defaults` are this target's own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ", ".join(shapes.PRESETS)
    made.add_argument(
        "--shape", type=_shape, default=shapes.PRESETS["small"],
        help=f"{presets}, or LAYERS,WIDTH,HEADS[,VOCABULARY]; random weights of this shape are made (default small)",
    )  # fmt: skip
    made.add_argument(
        "--tokenizer", default="builtin:small", metavar="DIR",
        help="directory of a GPT-2 tokenizer; default: peftune's own of 4,096 tokens, under the shape's vocabulary",
    )  # fmt: skip
    made.add_argument("--data", metavar="FILE", help="text to cut documents from (default: peftune's built-in corpora)")
    made.add_argument("--rounds", type=int, default=5, help="rounds that count; contestants take turns in each")
    made.add_argument("--warmup", type=int, default=1, help="rounds before, which do not count")
    made.add_argument("--threads", type=int, help="threads of each contestant (default: the libraries' own choice)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, help="keep base and documents here and use them again (default: temporary)")
    made.add_argument("--json", type=Path, help="also write everything, every round, as JSON")
    made.add_argument("--quick", action="store_true", help="a tiny shape and few rounds: does it run, not how fast")
    made.set_defaults(**defaults)
    return made


def add_training(made: argparse.ArgumentParser, peers: str, **defaults: Any) -> None:
    """Options of targets that train: documents, batches, adapter, peers."""
    made.add_argument("--documents", type=int, default=400, help="documents in the corpus")
    made.add_argument("--mean", type=float, default=185, help="mean tokens of a document; inf: all are --longest")
    made.add_argument("--longest", type=int, default=512, help="most tokens of a document, both <|endoftext|> included")
    made.add_argument("--block", type=int, default=512, help="peftune's data.block_size")
    made.add_argument(
        "--batch", type=int, default=8, help="peftune's blocks per step, and documents of peers without a setting"
    )
    made.add_argument(
        "--tokens", type=int, default=4000, help="real tokens of a round at least; rounds end with a step"
    )
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=float, default=16)
    made.add_argument(
        "--targets", default="c_attn", help="all, attention, or module names with commas (default c_attn)"
    )
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="recipe key of ours, such as run.precision=fp32",
    )
    made.add_argument("--peers", default=peers, help=f"with commas, of {', '.join(PEERS)} (default {peers})")
    made.add_argument("--tune", action="append", default=[], metavar="NAME:KEY=VALUE", help="another setting of a peer")
    made.add_argument(
        "--peer", action="append", default=[], metavar="JSON", help="one more peer, fields as in peers.Peer"
    )
    made.add_argument(
        "--gate-blocks", type=int, default=2, help="blocks whose gradients are compared first; 0: no gate"
    )
    made.set_defaults(**defaults)


def add_adapter(made: argparse.ArgumentParser, targets: str = "c_attn") -> None:
    """Options of targets whose adapters are random."""
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--targets", default=targets, help="all, attention, or module names with commas")


def parse(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `--quick` changes defaults only, so what is given beside it counts."""
    given = sys.argv[1:] if argv is None else argv
    if "--quick" in given:
        known = {action.dest for action in made._actions}
        kept = {"mean"} if made.get_default("mean") == math.inf else set()
        made.set_defaults(**{key: value for key, value in QUICK.items() if key in known - kept})
    arguments = made.parse_args(given)
    try:
        arguments.chosen_peers = chosen(arguments.peers, arguments.tune, arguments.peer) if "peers" in arguments else []
    except (ValueError, TypeError) as error:
        made.error(str(error))
    return arguments


def _shape(text: str) -> Shape:
    try:
        return shapes.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def targets_of(text: str) -> list[str]:
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
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if getattr(self.arguments, "device", "cpu") == "cpu" else {}
        return counts | switches | hidden | {"PEFTUNE_CACHE": str(self.root / "cache")}

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

    def ours(self, name: str = "peftune", overrides: list[str] | None = None, **changed: Any) -> Contestant:
        """peftune; overrides of the command come after those of the target."""
        given = [*(overrides or []), *self.arguments.ours, f"run.out={self.root / name.replace(' ', '-')}"]
        job = {"recipe": self.recipe(**changed), "overrides": given, "tokens": self.arguments.tokens}
        return Contestant(name, "benchmarks.ours", job, "tok/s", must_run=True)

    def peer(self, peer: Peer) -> Contestant:
        """A peer on the same base and documents with the same adapter."""
        a = self.arguments
        lora = {"rank": a.rank, "alpha": a.alpha, "targets": targets_of(a.targets)}
        job = {
            "peer": {"name": peer.name, **peer.told()}, "base": str(self.base), "documents": str(self.documents),
            "lora": lora, "tokens": a.tokens, "batch": a.batch, "device": a.device, "seed": a.seed,
        }  # fmt: skip
        return Contestant(peer.name, "benchmarks.peer_loop", job, "tok/s")

    def told(self) -> dict[str, Any]:
        """What was compared on what, to be printed with the figures."""
        a = self.arguments
        found = {"shape": str(a.shape), "weights": "random", "tokenizer": tokenizer_told(a), "rounds": a.rounds}
        found |= {"load average before": round(self.load, 2)}
        found |= {"warm-up rounds": a.warmup, "threads": a.threads or "default", "seed": a.seed}
        if self.lengths:
            found |= {"documents": {**corpus.statistics_of(self.lengths), "sha256": corpus.digest(self.documents)}}
            found |= {
                "tokens a round": a.tokens,
                "adapter": f"rank {a.rank} on {a.targets}",
                "ours": a.ours or "defaults",
            }
        return found


def tokenizer_told(arguments: argparse.Namespace) -> str:
    """Which tokenizer, and how it stands to the vocabulary of the shape."""
    if arguments.tokenizer == "builtin:small":
        rows = arguments.shape.vocabulary
        return f"builtin:small: ids are of its 4,096 tokens, the embedding and the head have {rows:,} rows"
    return Path(arguments.tokenizer).name


@contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Setup]:
    """Base and documents of a command, in `--work` or in a temporary directory."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="peftune-bench-") as scratch:
        root = Path(arguments.work or scratch).absolute()
        root.mkdir(parents=True, exist_ok=True)
        os.environ["PEFTUNE_CACHE"] = str(root / "cache")
        base = make_base(root, arguments.shape, arguments.tokenizer, arguments.seed)
        documents, lengths = root / "documents.jsonl", []
        prompted = getattr(arguments, "prompted", 0.0)
        if "documents" in arguments:
            from peftune.model.base import Base

            print("cutting documents", file=sys.stderr)
            documents = root / f"documents-{arguments.mean:g}-{arguments.longest}-{prompted:g}.jsonl"
            lengths = corpus.write_documents(
                documents, Base(base).tokenizer, arguments.documents, arguments.mean, arguments.longest,
                arguments.data, arguments.seed, prompted,
            )  # fmt: skip
        yield Setup(arguments, root, base, documents, lengths, load)


def make_base(root: Path, shape: Shape, tokenizer: str, seed: int) -> Path:
    """A checkpoint of random weights (float32) with this tokenizer, made unless it is there."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from peftune.model.base import open_base

    directory = open_base(tokenizer).directory if tokenizer.startswith("builtin:") else Path(tokenizer)
    name = f"base-{shape.layers}-{shape.width}-{shape.heads}-{shape.vocabulary}-{directory.name}-{seed}"
    if (root / name / "config.json").is_file():
        return root / name
    print(f"making a base: {shape}", file=sys.stderr)
    beside = root / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)
    torch.manual_seed(seed)
    words = AutoTokenizer.from_pretrained(directory)
    words.model_max_length = shapes.POSITIONS
    config = shape.config()
    config.bos_token_id = config.eos_token_id = words.eos_token_id
    GPT2LMHeadModel(config).save_pretrained(beside)
    words.save_pretrained(beside)
    _check_rows(beside, shape)
    beside.rename(root / name)
    return root / name


def _check_rows(directory: Path, shape: Shape) -> None:
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    if max(vocabulary.values()) >= shape.vocabulary:
        raise SystemExit(f"the tokenizer has {len(vocabulary):,} tokens, the shape only {shape.vocabulary:,} rows")
