"""The verb `generate`: prompts from options, files and test sets, or typed at the terminal."""
