"""Rows cut out of full-length ones, tails dropped: how the SLW paper and DeepSpeed did it (arXiv 2108.06084, 3.1).

    dealt     aaaaaaab bbcccccc        rows of the longest length, whatever the schedule asks for
    served    aaaa     bbcc            their first `seqlen` tokens
    lost          aaab     cccc        read and thrown away

An arm to compare with: it alone loses tokens on purpose, and counts them. (The paper cut rows out of concatenated
documents; these are dealt as all of ours are, so that the arms differ in nothing else.)
"""

from __future__ import annotations

import numpy as np

from pipeline.packing import Packed


def cut_rows(rows: Packed, seqlen: int) -> Packed:
    """The first `seqlen` tokens of each row."""
    ends = np.cumsum(rows.length)
    before = ends - rows.length  # tokens before each piece, over all rows ...
    row_begins = np.append(0, ends)[rows.offsets[:-1]]
    column = before - np.repeat(row_begins, np.diff(rows.offsets))  # ... and in its row
    length = np.clip(seqlen - column, 0, rows.length)
    kept = length > 0
    offsets = np.append(0, np.cumsum(kept))[rows.offsets]
    return Packed(rows.document[kept], rows.start[kept], length[kept], offsets)
