"""Programs that people use with servers of this protocol, against a real server; openai itself is in the other tests.

Each needs an environment of its own, since their pins clash with ours: one whose Python is named is run.

    python -m venv llm && llm/bin/pip install llm                          # or langchain-openai, or "lm-eval[api]"
    PEFTUNE_CLIENT_LLM=llm/bin/python python -m pytest tests/serve/test_clients.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from peftune.adapters.merge.merge import merge
from peftune.model.base import BUILTIN


def python_of(client: str) -> str:
    """The interpreter that has the client; skips the test where nobody named one."""
    variable = f"PEFTUNE_CLIENT_{client}"
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to a Python that has it")
    return os.path.abspath(os.environ[variable])


def run(python: str, *arguments: str, folder: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = clean | {"LLM_USER_PATH": str(folder), "HOME": str(folder), "OPENAI_API_KEY": "none"}
    command = [python, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url = sys.argv[1]
chat = ChatOpenAI(model="a7", base_url=url, api_key="none", temperature=0, max_tokens=6)
messages = [("system", "Be brief."), ("human", "Hi")]
text = OpenAI(model="a1", base_url=url, api_key="none", temperature=0, max_tokens=6)
print(json.dumps({
    "chat": chat.invoke(messages).content,
    "stream": "".join(part.content for part in chat.stream(messages)),
    "batch": [answer.content for answer in chat.batch([messages, messages])],
    "text": text.invoke("def main("),
    "text stream": "".join(text.stream("def main(")),
}))
"""


def answers(server: Any) -> tuple[str, str]:
    """What the server itself says to the chat and to the prompt that the clients send."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    common = {"temperature": 0, "max_tokens": 6}
    chat = server.client.chat.completions.create(model="a7", messages=messages, **common)
    text = server.client.completions.create(model="a1", prompt="def main(", **common)
    return chat.choices[0].message.content, text.choices[0].text


def test_langchain(server: Any, tmp_path: Path) -> None:
    found = json.loads(run(python_of("LANGCHAIN"), "-c", LANGCHAIN, f"{server.url}/v1", folder=tmp_path))
    chat, text = answers(server)
    assert found == {"chat": chat, "stream": chat, "batch": [chat, chat], "text": text, "text stream": text}


def test_simonw_llm(server: Any, tmp_path: Path) -> None:
    python = python_of("LLM")
    models = [
        {"model_id": "chat", "model_name": "a7", "api_base": f"{server.url}/v1"},
        {"model_id": "text", "model_name": "a1", "api_base": f"{server.url}/v1", "completion": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    chat, text = answers(server)
    options = ["-o", "temperature", "0", "-o", "max_tokens", "6"]
    for more in ([], ["--no-stream"]):
        found = run(python, "-m", "llm", "-m", "chat", "-s", "Be brief.", "Hi", *options, *more, folder=tmp_path)
        assert found == chat + "\n"
        found = run(python, "-m", "llm", "-m", "text", "def main(", *options, *more, folder=tmp_path)
        assert found == text + "\n"


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

if __name__ == "__main__":
    model = LocalCompletionsAPI(
        base_url=sys.argv[1] + "/v1/completions", model="a1", tokenizer_backend="huggingface", tokenizer=sys.argv[2],
        max_length=512,
    )
    pairs = [("def main(", "self):"), ("import", " os"), ("", "class Reader")]
    scores = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    settings = {"until": ["never"], "max_gen_toks": 6, "temperature": 0}
    texts = model.generate_until([Instance("generate_until", {}, ("def main(", settings), 0)])
    print("\\n" + json.dumps([scores, texts]))
"""


def test_lm_eval(server: Any, tmp_path: Path) -> None:
    """Its scores are the model's own, its text is the server's."""
    script = tmp_path / "score.py"
    script.write_text(LM_EVAL)
    tokenizer = str(tmp_path / "tokenizer")
    server.bank.tokenizer.save_pretrained(tokenizer)
    told = run(python_of("LM_EVAL"), str(script), server.url, tokenizer, folder=tmp_path)
    scores, texts = json.loads(told.splitlines()[-1])
    assert texts == [answers(server)[1]]
    for (found, _), context, continuation in zip(
        scores, ("def main(", "import", ""), ("self):", " os", "class Reader"), strict=True
    ):
        ids, least = server.bank.encode(context + continuation), len(server.bank.encode(context))
        nats = server.bank.logits(torch.tensor([ids]), ["a1"])[0].double().log_softmax(-1)
        expected = sum(float(nats[at - 1, ids[at]]) for at in range(least, len(ids)))
        assert found == pytest.approx(expected, abs=1e-3)


TASKS = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
---
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", "Q:", "</s>", "###", "<|end|>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
---
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
QUESTIONS = [("def main(", ["self):", "argv):"]), ("import", [" os", " sys"]), ("The value of", [" x is", " the"])]


def measured(folder: Path) -> dict[str, float | str]:
    """Every result of one run, and its answer to every request."""
    (results,) = folder.rglob("results_*.json")
    found = {
        f"{task} {metric}": value
        for task, values in json.loads(results.read_text())["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.split("_20")[0].removeprefix("samples_")
        for sample in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            answers = [answer for (answer,) in sample["resps"]]
            for number, answer in enumerate(answers):
                value = answer[0] if isinstance(answer, list) else answer  # nats, whether greedy says so
                found[f"{task} {sample['doc_id']} {number}"] = value if task == "tiny_text" else float(value)
    return found


def test_lm_eval_measures_the_same_by_adapter_merged_checkpoint_and_server(
    server: Any, root: Path, tmp_path: Path
) -> None:
    """By the commands of docs/evaluate.md; a perplexity brings the begin of text itself, so there nothing adds one."""
    python, base = python_of("LM_EVAL"), BUILTIN["builtin:small"]
    merge(root / "a1", tmp_path / "merged")
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, task in enumerate(TASKS.replace("FOLDER", str(tmp_path)).split("---\n")):
        (tmp_path / f"{number}.yaml").write_text(task)
    adapter, merged = f"pretrained={base},peft={root / 'a1'},dtype=float32", f"pretrained={tmp_path / 'merged'}"
    served = f"model=a1,base_url={server.url}/v1/completions,tokenizer={base},tokenizer_backend=huggingface"
    for tasks, ways in {
        "tiny_choice,tiny_text": (("hf", f"{adapter},add_bos_token=True"), ("hf", merged)),
        "tiny_perplexity": (("hf", adapter), ("hf", f"{merged},add_bos_token=False")),
    }.items():
        found = []
        for model, arguments in (*ways, ("local-completions", f"{served},max_length=511")):
            out = tmp_path / f"{tasks}{len(found)}"
            call = ["-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", tasks, "--device", "cpu"]
            call += ["--include_path", str(tmp_path), "--log_samples", "--output_path", str(out)]
            run(python, *call, folder=tmp_path)
            found.append(measured(out))
        assert len(found[0]) == (3 + 6 + 3 if "," in tasks else 1 + 3)
        for other in found[1:]:
            assert other == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for k, v in found[0].items()}
