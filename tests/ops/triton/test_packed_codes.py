"""Values of 2:4 are put at their places by permutations of bytes; in the interpreter arithmetic stands for those."""

from __future__ import annotations

import pytest
import torch
from helpers.packed_codes import assert_every_code_is_placed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "kernel"), [(1, "packed_vector"), (4, "packed_linear")])
def test_values_of_every_code_stand_at_their_places(tokens, kernel, dtype, launched):
    assert_every_code_is_placed(tokens, dtype)
    assert launched[kernel] == 4 // tokens
