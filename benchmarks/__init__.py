"""Side-by-side measurements: `python -m benchmarks.train --help`, `python -m benchmarks.all`.

What is compared runs in processes of its own that take turns (`harness.workers`), so that a machine which slows down
slows all of them; figures are medians over rounds with the lowest and the highest beside them. A target that is about
training is gated: gradients are compared with PEFT's, document by document, before anything is timed
(`harness.ours`).
"""
