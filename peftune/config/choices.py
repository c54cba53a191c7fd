"""What settings may be, for the recipe and for the options that have the same name; nothing is imported."""

from __future__ import annotations

from typing import Literal

Chat = Literal["eos-turns", "plain"]
Device = Literal["auto", "cpu", "cuda"]
Lint = Literal["off", "strict", "warn"]
OnBadRow = Literal["refuse", "skip"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SpecialTokens = Literal["parse", "text"]
SplitOn = Literal["auto", "blank-line", "endoftext", "file", "line", "wide-gap"]
UnknownFiles = Literal["refuse", "skip"]
