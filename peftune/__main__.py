"""`python -m peftune` is the same program as `peftune`; `accelerate launch -m peftune train …` needs it."""

from peftune.cli.main import main

main()
