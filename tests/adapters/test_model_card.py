"""A model card has the front matter that hubs read, a title and commands that can be copied."""

from __future__ import annotations

import yaml

from peftune.adapters.model_card import model_card


def test_front_matter_title_and_commands() -> None:
    card = model_card("gpt2", "adapters/poems/", "What it is.")
    _, front, text = card.split("---\n")
    assert yaml.safe_load(front) == {"base_model": "gpt2", "library_name": "peft", "tags": ["gpt2", "lora", "peftune"]}
    assert text.startswith("\n# poems\n\nWhat it is.\n\n## Use\n")
    assert "peftune generate --base gpt2 --adapter adapters/poems/ " in text
    assert "peftune merge adapters/poems/ --out adapters/poems-merged" in text
