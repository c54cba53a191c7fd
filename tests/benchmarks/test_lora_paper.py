"""The paper's experiment at small size, and its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lora_paper import FILES, _in_words, interval, main, table
from peftune.config.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
E2E = "".join(
    f"name : Café {n} | area : riverside||Café {n} lies at the riverside .\nname : Café {n} | area : riverside||"
    f"By the river is Café {n} . \n"
    for n in range(6)
)
WEBNLG = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "modifiedtripleset": [
                    {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus"'},
                    {"subject": "Aarhus", "property": "country", "object": "Denmark"},
                ],
                "lexicalisations": [
                    {"comment": "good", "lex": "Aarhus, in Denmark, has an airport."},
                    {"comment": "bad", "lex": "Airport."},
                ],
            }
        }
    ]
}
DART = [{"tripleset": [["Mars Hill College", "JOINED", "1973"]], "annotations": [{"text": "It joined in 1973."}]}]


@pytest.mark.parametrize(
    ("task", "text", "row"),
    [
        ("e2e", E2E, ("name : Café 0 | area : riverside", "Café 0 lies at the riverside .")),
        (
            "webnlg",
            json.dumps(WEBNLG),
            (
                'Aarhus_Airport : cityServed : "Aarhus" | Aarhus : country : Denmark',
                "Aarhus, in Denmark, has an airport.",
            ),
        ),
        ("dart", json.dumps(DART), ("Mars Hill College : joined : 1973", "It joined in 1973.")),
    ],
)
def test_a_published_file_becomes_the_rows_of_the_paper(
    tmp_path: Path, task: str, text: str, row: tuple[str, str]
) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    found = list(FILES[task][0](tmp_path / "file"))
    assert found[0] == row and len(found) == (12 if task == "e2e" else 1)


@pytest.mark.parametrize(("task", "decay", "rest"), [("e2e", 0.01, 0.1), ("webnlg", 0.01, 0.1), ("dart", 0.0, 0.0)])
def test_the_recipes_have_the_published_settings(task: str, decay: float, rest: float) -> None:
    recipe = load_recipe(RECIPES / f"{task}.yaml")
    lora, optim = recipe.lora, recipe.optim
    assert (recipe.base, lora.targets, lora.rank, lora.alpha) == ("gpt2-medium", "query-value", 4, 32)
    assert (optim.lr, optim.schedule, optim.warmup, optim.epochs, optim.clip) == (2e-4, "linear", 500, 5, None)
    assert (optim.weight_decay, optim.label_smoothing, lora.dropout) == (decay, rest, rest)
    assert (recipe.batch.global_size, recipe.data.block_size, recipe.data.one_document_per_block) == (8, 512, True)


def test_from_the_files_to_the_row_and_on_from_where_it_was_cut(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu", reason="the extra `score` is not installed")
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(E2E, encoding="utf-8")
    out = tmp_path / "out"
    options = ["e2e", "--data", str(tmp_path), "--small", "--base", str(tiny_base), "--out", str(out)]
    call = [*options, "optim.steps=2", "--seeds", "2"]
    main(call)
    first = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert f"here, 2 seeds{first['table'].rpartition('here, 2 seeds')[2]}" in capfd.readouterr().out
    assert len(first["seeds"]) == 2 and set(first["seeds"][0]) == {"BLEU", "NIST", "ROUGE-L", "CIDEr"}
    texts = [out / f"seed-{seed}" / "texts-0.8.jsonl" for seed in (0, 1)]
    rows = [json.loads(line) for line in texts[0].read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [f"name : Café {n} | area : riverside<|endoftext|>" for n in range(6)]
    assert all(len(row["references"]) == 2 for row in rows)
    told = json.loads((out / "seed-0" / "adapter" / "peftune.json").read_text(encoding="utf-8"))
    assert told["recipe"]["optim"]["steps"] == 2 and told["recipe"]["lora"]["targets"] == "query-value"
    was = texts[0].stat().st_mtime_ns
    texts[1].unlink()
    main(call)
    assert texts[0].stat().st_mtime_ns == was
    assert json.loads((out / "scores.json").read_text(encoding="utf-8")) == first
    assert capfd.readouterr().out.count("$ peftune generate") == 1
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(SystemExit, match=r"valid\.txt: not there; expected the data of microsoft/LoRA: train\.txt"):
        main(call)


def test_triples_are_scored_in_the_words_of_the_paper(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the extra `score` is not installed")
    for part in ("dev", "test"):
        (tmp_path / f"dart-v1.1.1-full-{part}.json").write_text(json.dumps(DART * 4), encoding="utf-8")
    options = ["dart", "--data", str(tmp_path), "--small", "--base", str(tiny_base), "--out", str(tmp_path / "out")]
    main([*options, "--seeds", "1", "--length-penalty", "0.9", "optim.steps=1", "optim.warmup=0"])
    row = json.loads((tmp_path / "out" / "seed-0" / "words.jsonl").read_text(encoding="utf-8"))
    assert row["references"] == ["it joined in 1973 ."] * 4
    assert (tmp_path / "out" / "seed-0" / "texts-0.9.jsonl").is_file()
    assert "here, 1 seed " in json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["table"]


def test_the_table_has_the_published_rows_and_an_interval_over_seeds() -> None:
    assert interval([68.0, 69.0, 70.0]) == "69.00 ± 2.48" and interval([68.0]) == "68.00"
    shown = table("e2e", "gpt2-medium", [{"BLEU": 68.0, "NIST": 8.6}, {"BLEU": 69.0, "NIST": 8.6}]).splitlines()
    assert [line.split()[0] for line in shown] == ["e2e,", "paper", "independent", "here,"]
    assert "70.4" in shown[1] and "68.65-68.87" in shown[2] and "68.50 ± 6.35" in shown[3]


def test_texts_are_scored_in_the_words_of_the_paper() -> None:
    row = {"prompt": "p", "hypothesis": "It's in Café (A).", "references": ["One."] * 7}
    found = json.loads(_in_words(json.dumps(row)))
    assert (found["hypothesis"], found["references"]) == ("it ' s in café ( a ) .", ["one ."] * 6)
