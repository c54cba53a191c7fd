"""`python -m peftune` is the same program as `peftune`; `accelerate launch -m peftune train …` needs it."""

from peftune.cli import stop


def main() -> None:
    """Run the program; signals are answered before the rest of it is imported."""
    stop.install()
    with stop.answered():
        from peftune.cli.main import main

        main()


if __name__ == "__main__":
    main()
