"""What is said of a corpus: one kind of fault, how often, where, what it does to training, and the fix."""

from __future__ import annotations

from dataclasses import dataclass

from peftune.console import counted
from peftune.data.documents import LeftOut
from peftune.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One kind of problem: how many documents have it, the first three of them, and what it does and what to do.

    What is not `loud` is told by `peftune data` and where `data.lint` is strict, not at the start of every run.
    """

    what: str
    documents: int
    first: str
    advice: str
    loud: bool = True
    unit: str = "document"
    """What is counted: documents, or rows of which none was made."""

    def head(self) -> str:
        """The fault, how often it is there, and where; without a count it is no fault of single documents."""
        return f"{self.what}: {counted(self.documents, self.unit)}, first {self.first}" if self.documents else self.what

    def line(self) -> str:
        """The finding in one line."""
        return f"{self.head()}: {self.advice}"


def of_rows(left_out: LeftOut) -> list[Finding]:
    """A finding for each reason for which rows were skipped, the commonest first, and for what `where` never found."""
    advice = "nothing is learnt from them; mend them, or look whether the right columns are read"
    several = sorted(left_out.skipped.items(), key=lambda item: -item[1].rows)
    found = [Finding(f"skipped rows, {why}", group.rows, group.places(), advice, unit="row") for why, group in several]
    if left_out.never:
        what = f"where asks for what no row holds: {', '.join(left_out.never)}"
        found.append(Finding(what, 0, "", "look for a spelling mistake, or leave it out"))
    return found


def refuse_all(found: list[Finding]) -> None:
    """UserError that names every finding, where there is one (`data.lint: strict`)."""
    if found:
        listed = "; ".join(f"({number}) {one.line()}" for number, one in enumerate(found, start=1))
        raise UserError(f"data.lint is strict, and there is something to mend in the text: {listed}")
