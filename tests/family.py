"""The GPT-2s that people bring: one row for each kind, for the test that holds them and the page that lists them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Member:
    """One kind of GPT-2 checkpoint, made small: what its config.json and its files have that others have not.

    `config` are values of GPT2Config; `stored` changes config.json as it lies there; `files` names how the weights
    are stored; `tokenizer` a writer of `foreign_tokenizers`, "control" GPT-2's with a special token more. `refused`
    is what the refusal says (a regular expression), empty where it works.
    """

    name: str
    examples: str
    special: str
    config: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)
    files: str = "safetensors"
    tokenizer: str = ""
    refused: str = ""
    reason: str = ""
    """Why it is refused, for the page."""


_OLD = {"n_ctx": 64, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
_SUMMARY = {"summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True}
_LONG_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}

FAMILY = [
    Member("GPT-2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2", "bare names, mask buffers (`attn.bias`)",
           stored=_OLD | _SUMMARY, files="bare"),
    Member("DialoGPT", "microsoft/DialoGPT-small", "float16 in a .bin file, `masked_bias`, a copy of the head",
           stored=_OLD, files="dialogpt"),
    Member("Mistral", "stanford-crfm/alias-gpt2-small-x21, stanford-crfm/BioMedLM",
           "`scale_attn_by_inverse_layer_idx`, `reorder_and_upcast_attn`",
           {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    Member("upcast", "codeparrot/codeparrot-small", "`reorder_and_upcast_attn`", {"reorder_and_upcast_attn": True}),
    Member("Cerebras-GPT", "cerebras/Cerebras-GPT-111M", "`gelu`, `n_inner`",
           {"activation_function": "gelu", "n_inner": 48}),
    Member("relu", "own trainings", "`relu`", {"activation_function": "relu"}),
    Member("gelu_fast", "own trainings", "`gelu_fast`", {"activation_function": "gelu_fast"}),
    Member("silu", "own trainings", "`silu`", {"activation_function": "silu"}),
    Member("unscaled", "own trainings", "`scale_attn_weights: false`", {"scale_attn_weights": False}),
    Member("odd heads", "own trainings", "3 heads of 5, an odd context",
           {"n_embd": 15, "n_head": 3, "n_positions": 61}),
    Member("untied", "own trainings", "`tie_word_embeddings: false`", {"tie_word_embeddings": False}),
    Member("differing head", "conversions", "config.json says tied, the file holds another head",
           {"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    Member("added tokens", "resized checkpoints", "more rows than tokens", {"vocab_size": 303}),
    Member("padded vocabulary", "checkpoints padded to a multiple of 64", "the last rows are zeros",
           {"vocab_size": 320}, files="padded"),
    Member("mGPT", "ai-forever/mGPT", "100,000 tokens, context 2,048",
           {"vocab_size": 100_000, "n_positions": 2048, "n_embd": 16}),
    Member("no model_type", "uploads of 2019", "only `architectures` names the model", stored={"model_type": None}),
    Member("long names", "conversions", "`hidden_size` and its like", stored={"rename": _LONG_NAMES}),
    Member("whole numbers", "hand-written config.json", "`initializer_range: 1`, `resid_pdrop: 0`",
           stored={"initializer_range": 1, "resid_pdrop": 0, "layer_norm_epsilon": 1e-5}),
    Member("classifier", "sequence and token classification", "`score.weight`, left out of a merge and said",
           stored={"architectures": ["GPT2ForSequenceClassification"], "num_labels": 3}, files="score.weight"),
    Member("double heads", "GPT2DoubleHeadsModel", "`multiple_choice_head`, left out of a merge and said",
           stored={"architectures": ["GPT2DoubleHeadsModel"]} | _SUMMARY, files="multiple_choice_head.summary.weight"),
    Member("sharded .bin", "large old uploads", "pytorch_model.bin.index.json", files="bin-shards"),
    Member("sharded safetensors", "large uploads", "model.safetensors.index.json", files="shards"),
    Member("bfloat16", "recent uploads", "bfloat16 weights", stored={"dtype": "bfloat16"}, files="bfloat16"),
    Member("float16", "recent uploads", "float16 weights", stored={"torch_dtype": "float16"}, files="float16"),
    Member("BertTokenizer", "uer/gpt2-chinese-cluecorpussmall", "vocab.txt; `[CLS]` and `[SEP]` begin and end texts",
           stored={"tokenizer_class": "BertTokenizer", "bos_token_id": None, "eos_token_id": 50256}, tokenizer="bert"),
    Member("KoGPT2", "skt/kogpt2-base-v2", "not byte-level; only config.json names the end of text",
           stored={"bos_token_id": 0, "eos_token_id": 1}, tokenizer="korean"),
    Member("sentencepiece", "rinna/japanese-gpt2-medium", "spiece.model, `<s>` and `</s>`",
           stored={"bos_token_id": 1, "eos_token_id": 2}, tokenizer="sentencepiece"),
    Member("Unigram", "conversions of such", "tokenizer.json of pieces with scores",
           stored={"bos_token_id": 1, "eos_token_id": 2}, tokenizer="unigram"),
    Member("begin apart from end", "ai-forever/rugpt3small_based_on_gpt2", "GPT-2's own kind with `<s>` and `</s>`",
           stored={"bos_token_id": 1, "eos_token_id": 2}, tokenizer="russian"),
    Member("control tokens", "own trainings", "special tokens such as `<|title|>`: text, or with "
           "`data.special_tokens: parse` the tokens", {"vocab_size": 301}, tokenizer="control"),
    Member("SantaCoder", "bigcode/santacoder", "multi-query attention by code in its repository",
           stored={"architectures": ["GPT2LMHeadCustomModel"], "auto_map": {"AutoConfig": "configuration_gpt2_mq.X"}},
           refused="runs no such code", reason="computes with code from its repository, which peftune never runs"),
    Member("gpt_bigcode", "bigcode/gpt_bigcode-santacoder, bigcode/starcoderbase-1b", "another architecture",
           stored={"model_type": "gpt_bigcode"}, refused="model_type is gpt_bigcode", reason="not a GPT-2"),
    Member("GPT-Neo", "EleutherAI/gpt-neo-125m", "another architecture",
           stored={"model_type": "gpt_neo"}, refused="model_type is gpt_neo", reason="not a GPT-2"),
    Member("BioGPT", "microsoft/biogpt", "another architecture",
           stored={"model_type": "biogpt"}, refused="model_type is biogpt", reason="not a GPT-2"),
    Member("quantized upload", "4-bit and GPTQ uploads", "`quantization_config`",
           stored={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
           refused="stored quantized", reason="bring it in full precision; the recipe's `quantize` packs it"),
    Member("decoder of another model", "encoder-decoder checkpoints", "`add_cross_attention`",
           stored={"add_cross_attention": True}, refused="add_cross_attention",
           reason="not a language model by itself"),
    Member("TensorFlow or Flax", "uploads without PyTorch weights", "tf_model.h5, flax_model.msgpack", files="tf",
           refused="TensorFlow's or Flax's only", reason="Transformers before version 5 converts it"),
    Member("biased head", "conversions from GPT-J's like", "`lm_head.bias`", files="lm_head.bias",
           refused="lm_head.bias, which no GPT-2 has", reason="a GPT-2 has no such tensor"),
]  # fmt: skip
