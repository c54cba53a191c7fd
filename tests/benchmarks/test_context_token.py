"""What the command leaves out, and what it compares."""

from __future__ import annotations

import numpy as np

from benchmarks.context_token import bare_beginnings
from peftune.data import batches
from peftune.data.packing import cut_into_windows


def test_a_share_of_the_documents_begins_without_its_first_token_and_nothing_else_changes() -> None:
    lengths = np.array([5, 2, 40] * 200)
    whole = cut_into_windows(lengths, 16)
    for share in (0.0, 0.25, 1.0):
        with bare_beginnings(share, 1):
            cut = batches.cut_into_windows(lengths, 16)
        bare = cut.start != whole.start
        assert (cut.stop == whole.stop).all() and (cut.example == whole.example).all()
        assert set(cut.start[bare]) <= {1} and not bare[lengths[whole.example] == 2].any()
        long = (lengths[whole.example] > 2) & (whole.start == 0)
        assert abs(bare[long].mean() - share) < 0.06
    assert batches.cut_into_windows is cut_into_windows
