"""Greedy tokens by llama.cpp; runs under a Python that has llama-cpp-python, which need not be that of the tests.

Reads {"model", "lora", "prompts": [text, …], "tokens"} from standard input; writes for each prompt its ids, those
that follow, and the gap in logits between the two likeliest at every step.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama

asked = json.load(sys.stdin)
llama = Llama(
    asked["model"], lora_path=asked["lora"], n_ctx=512, n_threads=1, n_batch=512, logits_all=True, verbose=False
)
found = []
for prompt in asked["prompts"]:
    ids = llama.tokenize(prompt.encode(), add_bos=True, special=False)
    llama.reset()
    llama.eval(ids)
    made, gaps = [], []
    while True:
        logits = np.array(llama.scores[llama.n_tokens - 1])
        second, first = np.sort(logits)[-2:]
        made.append(int(logits.argmax()))
        gaps.append(float(first - second))
        if made[-1] == llama.token_eos() or len(made) == asked["tokens"]:
            break
        llama.eval(made[-1:])
    found.append({"ids": ids, "made": made, "gaps": gaps})
json.dump(found, sys.stdout)
