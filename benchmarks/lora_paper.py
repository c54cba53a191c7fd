"""The experiment of LoRA's paper (arXiv 2106.09685) on E2E, WebNLG and DART, from the files to the table's row.

    python -m benchmarks.lora_paper e2e --data LoRA/examples/NLG/data/e2e                       three seeds, gpt2-medium
    python -m benchmarks.lora_paper dart --data LoRA/examples/NLG/data/dart --base gpt2-large --seeds 5
    python -m benchmarks.lora_paper e2e --data LoRA/examples/NLG/data/e2e --small               does it run, on a CPU

Files are those of https://github.com/microsoft/LoRA, examples/NLG/data, as they come. The command prepares them, then
for each seed trains, decodes the test set and scores, each step by a command of peftune that is printed first. The
same command goes on where it was cut: training at its last checkpoint, decoding at the seed. `key=value` at the end
goes to every training. docs/evaluate.md says in what this differs from the paper's own code.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftune.cli.main import run
from peftune.data.tokens.encode import encode_texts
from peftune.files import write_json, write_text
from peftune.model.base import open_base

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
SMALL = "builtin:small"
SMALL_PARTS = {"train": slice(1, 320, 2), "valid": slice(0, 80, 2), "test": slice(60)}  # rows
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")
PUBLISHED: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("e2e", "gpt2-medium"): {
        "paper": ("70.4", "8.85", "46.8", "71.8", "2.53"),
        "independent (microsoft/LoRA#165)": ("68.65-68.87", "8.68-8.69", "46.4-46.5", "71.2-71.4", "2.50-2.51"),
    },
    ("e2e", "gpt2-large"): {"paper": ("70.4", "8.89", "46.8", "72.0", "2.47")},
    ("webnlg", "gpt2-medium"): {"paper": ("55.3",)},
    ("webnlg", "gpt2-large"): {"paper": ("57.0",)},
    ("dart", "gpt2-medium"): {"paper": ("47.1",)},
    ("dart", "gpt2-large"): {"paper": ("47.5",)},
}
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for intervals of 95 %, by degrees of freedom from 1."""

Rows = Iterator[tuple[str, str]]


def e2e(path: Path) -> Rows:
    """Rows of lines `meaning||reference`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            context, completion = line.strip().split("||")[:2]
            yield context, completion


def webnlg(path: Path) -> Rows:
    """A row for each wording that people found good."""
    for numbered in json.loads(path.read_text(encoding="utf-8"))["entries"]:
        (entry,) = numbered.values()
        triples = [(one["subject"], one["property"], one["object"]) for one in entry["modifiedtripleset"]]
        for wording in entry["lexicalisations"]:
            if wording["comment"] == "good":
                yield _joined(triples), wording["lex"]


def dart(path: Path) -> Rows:
    """A row for each wording; relations in small letters."""
    for entry in json.loads(path.read_text(encoding="utf-8")):
        context = _joined([(subject, relation.lower(), object) for subject, relation, object in entry["tripleset"]])
        for wording in entry["annotations"]:
            yield context, wording["text"]


def _joined(triples: list[tuple[str, str, str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


FILES: dict[str, tuple[Callable[[Path], Rows], dict[str, str]]] = {
    "e2e": (e2e, {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}),
    "webnlg": (webnlg, {"train": "train.json", "valid": "dev.json", "test": "test.json"}),
    "dart": (dart, {part: f"dart-v1.1.1-full-{name}.json" for part, name in
                    {"train": "train", "valid": "dev", "test": "test"}.items()}),
}  # fmt: skip


def prepare(task: str, data: Path, out: Path, small: bool) -> None:
    """Write train, valid and test as rows of `context` and `completion`; a small run learns from validation rows."""
    read, files = FILES[task]
    for part, name in files.items():
        path = data / (files["valid"] if small and part == "train" else name)
        if not path.is_file():
            raise SystemExit(f"{path}: not there; expected the data of microsoft/LoRA: {', '.join(files.values())}")
        rows = [{"context": context, "completion": completion} for context, completion in read(path)]
        rows = rows[SMALL_PARTS[part]] if small else rows
        write_text(out / f"{part}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def peftune(*arguments: str) -> None:
    """Print a command and run it; ends with its exit code where it fails."""
    print("$ peftune " + shlex.join(arguments), flush=True)
    if code := run(list(arguments)):
        raise SystemExit(code)


def one_seed(task: str, seed: int, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Scores of one seed: train, decode where there are no texts of this adapter yet, score."""
    folder, data = out / f"seed-{seed}", out / "data"
    folder.mkdir(exist_ok=True)
    adapter, texts = folder / "adapter", folder / f"texts-{options.length_penalty:g}.jsonl"
    small = ["optim.steps=20", "optim.warmup=2", "data.block_size=auto"] if options.small else []
    paths = [f"data.train.path={data / 'train.jsonl'}", f"data.validation.path={data / 'valid.jsonl'}"]
    values = [f"base={options.base}", *paths, f"run.out={adapter}", f"run.seed={seed}", *small, *options.overrides]
    peftune("train", str(RECIPES / f"{task}.yaml"), *values)
    weights = adapter / "adapter_model.safetensors"
    if not texts.is_file() or texts.stat().st_mtime < weights.stat().st_mtime:
        blank_line = encode_texts(["\n\n"], open_base(options.base).tokenizer)[0]
        ends = ["--stop", "\n\n", *(["--stop-token-id", str(blank_line[0])] if len(blank_line) == 1 else [])]
        search = ["--length-penalty", f"{options.length_penalty:g}", "--no-repeat-ngram-size", "4", "--repeat-prompt"]
        search += ["--beams", "2" if options.small else "10", "--max-new-tokens", "12" if options.small else "64"]
        columns = ["--column", "prompt={context}<|endoftext|>", "--column", "completion=completion"]
        asked = ["--adapter", str(adapter), "--test-set", str(data / "test.jsonl"), *columns]
        peftune("generate", *asked, *search, *ends, "--out", str(texts))
    scored, scores = texts, folder / "scores.json"
    if task != "e2e":
        scored = folder / "words.jsonl"
        write_text(scored, "".join(map(_in_words, texts.read_text(encoding="utf-8").splitlines())))
    peftune("score", str(scored), "--json", str(scores), *(["--meteor"] if options.meteor else []))
    (found,) = json.loads(scores.read_text(encoding="utf-8"))["systems"].values()
    return {metric: found[metric]["score"] for metric in METRICS if metric in found}


def _in_words(line: str) -> str:
    """A row of texts and references as the paper scores WebNLG and DART: small letters, words and signs apart."""
    row = json.loads(line)

    def words(text: str) -> str:
        return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())

    row |= {"hypothesis": words(row["hypothesis"]), "references": [words(text) for text in row["references"][:6]]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def interval(values: list[float]) -> str:
    """The mean over seeds with the half width of its interval of 95 % (Student's t), where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def table(task: str, base: str, scores: list[dict[str, float]]) -> str:
    """What was published, and the mean over seeds beside it."""
    ours = tuple(interval([one[m] for one in scores]) if m in scores[0] else "-" for m in METRICS)
    rows: dict[str, tuple[str, ...]] = {f"{task}, {base}": METRICS, **PUBLISHED.get((task, base), {})}
    rows |= {f"here, {len(scores)} seed{'s'[: len(scores) - 1]}": ours}
    return "\n".join(f"{name:34}" + "".join(f"{value:>16}" for value in values) for name, values in rows.items())


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train, decode and score for each seed; print the table, and write it with every score as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=FILES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for every training")
    parser.add_argument("--data", type=Path, required=True, help="directory of the published files")
    parser.add_argument("--out", type=Path, help="default: lora-paper/TASK-BASE")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T_95) + 2), metavar="N")
    parser.add_argument("--base", help=f"default: gpt2-medium, with --small {SMALL}")
    parser.add_argument("--length-penalty", type=float, default=0.8, help="0.8 as the paper's README, 0.9 as its text")
    parser.add_argument("--meteor", action="store_true", help="METEOR too; needs Java")
    parser.add_argument("--small", action="store_true", help="few rows and steps, to see that everything runs")
    options = parser.parse_intermixed_args(arguments)
    options.base = options.base or (SMALL if options.small else "gpt2-medium")
    name = re.sub(r"\W", "-", Path(options.base).name) + ("-small" if options.small else "")
    out: Path = options.out or Path("lora-paper") / f"{options.task}-{name}"
    (out / "data").mkdir(parents=True, exist_ok=True)
    prepare(options.task, options.data, out / "data", options.small)
    scores = [one_seed(options.task, seed, out, options) for seed in range(options.seeds)]
    shown = table(options.task, options.base, scores)
    print(f"\n{shown}")
    found: dict[str, Any] = {"task": options.task, "base": options.base, "length_penalty": options.length_penalty}
    write_json(out / "scores.json", found | {"small": options.small, "seeds": scores, "table": shown})


if __name__ == "__main__":
    main()
