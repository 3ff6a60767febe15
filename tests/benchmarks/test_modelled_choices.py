"""What the package chooses by the cost model is what the model says of the kernels as they are."""

from __future__ import annotations

import pytest
from chips import CHIPS
from helpers.children import Child

pytestmark = pytest.mark.slow

CHILD = """
import math
import cost_model as model
from maskpro_kernels.ops.mask_costs import COSTS
from maskpro_kernels.ops.triton import tiles
from mask_costs import modelled
shapes, gap = [(4096, 4096), (11008, 4096), (1024, 4096)], 10.0
for target in model.CHIPS:
    def mean(faster):
        # of several layers, how much longer the second way takes than the first
        return math.exp(sum(math.log(faster(rows, k)) for rows, k in shapes) / len(shapes))
    def inside(*of):
        return model.product_launch(*of).bound[0]
    def fused(*of):
        return model.fused_launch(*of).bound[0]
    def behind(target, *of):
        return model.library_seconds(target, *of[3:-1]) + model.step_launch(target, *of).bound[0]
    steps = (behind, fused), (32, 64, 96, 128, 256, 512, 1024, 2048)
    for most, ways, tokens, kind in (
        (tiles.DRAWN_TOKENS[target], (model.drawn_before_seconds, inside), (32, 64, 128), ()),
        *((tiles.fused_tokens(kind, target), *steps, (kind,)) for kind in ("drawn", "codes")),
    ):
        for t in tokens:
            of = lambda rows, k: (target, 2, 4, gap, rows, k, t, *kind)
            ratio = mean(lambda rows, k: ways[0](*of(rows, k)) / ways[1](*of(rows, k)))
            tell([target, t, most, ratio])
    tell([target, None, list(modelled(target)), list(COSTS[target])])
"""


def test_thresholds_and_costs_are_those_of_the_model():
    """One way is taken up to where the model has both take about as long."""
    with Child() as child:
        rows = child(CHILD)
    costs = [row for row in rows if row[1] is None]
    ways = [row for row in rows if row[1] is not None]
    assert len(costs) == len(CHIPS) and len(ways) == len(CHIPS) * (3 + 2 * 8)
    for target, tokens, most, ratio in ways:
        assert ratio > 0.97 if tokens <= most else ratio < 1.1, (target, tokens, most, ratio)
    for target, _, *pair in costs:
        for found, held in zip(*pair, strict=True):
            assert found == pytest.approx(held, abs=0.1), (target, *pair)
