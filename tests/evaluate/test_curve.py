"""Over how much held-out data a curve is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.datasets import write_dataset

from skvr_dist.errors import UserError
from skvr_dist.evaluate.curve import USUAL_SEQUENCES, HeldOutData


@pytest.mark.parametrize(("tokens", "measured"), [(4 * 5, 5), (4 * 21, 16), (4 * 400, USUAL_SEQUENCES)])
def test_without_a_number_as_much_as_there_is(tmp_path: Path, tokens: int, measured: int) -> None:
    """What is asked for is measured or refused, what is usual is adapted to the data."""
    held_out = HeldOutData([write_dataset(tmp_path / "data", [[[7] * tokens]])], 4, False)
    assert sum(len(batch.tokens) for batch in held_out.batches(None, 8, "cpu")) == measured
    with pytest.raises(UserError, match=r"sequences of 4 tokens, but 408 are asked for; .*--sequences or --batch-size"):
        held_out.batches(403, 8, "cpu")
