"""peftune: fine-tune GPT-2 with LoRA adapters and be able to believe every number it prints."""

__version__ = "0.1.0"
