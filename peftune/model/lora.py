"""Adapters on a GPT-2 through PEFT: the only place, with the merge, that knows about `Conv1D`."""
