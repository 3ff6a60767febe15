"""Layers whose rows fully_shard shares out over ranks: they learn by the bits of one process."""

from __future__ import annotations

import pytest
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import learn_sharded


@pytest.mark.parametrize("how", ["reinforce"])
def test_sharded_layers_learn_by_the_bits_of_one_process(how, eager_reference):
    steps = {"how": how, "steps": 3, "accumulate": 2}
    logits, records = learn_sharded(0, None, **steps)
    for theirs, seen in all_in_ranks(2, learn_sharded, mesh=[2], **steps):
        assert_same_bits(theirs, logits)
        assert seen == records
