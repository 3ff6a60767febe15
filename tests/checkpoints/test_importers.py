"""How a format of masks is added."""

from __future__ import annotations

import json

import torch
from torch import nn

from maskpro_kernels.checkpoints.importers import learned_masks


def test_a_new_format_of_masks_is_one_function_and_one_entry(tmp_path, monkeypatch):
    def stored_masks(source):
        for name, rows in json.loads(source.read_text()).items():
            yield name, torch.tensor(rows).bool()

    monkeypatch.setitem(learned_masks.MASK_FORMATS, ".json", stored_masks)
    file = tmp_path / "masks.json"
    file.write_text(json.dumps({"a.mask": [[1, 0, 1, 0], [0, 0, 0, 1]]}))
    masks = learned_masks.read_masks(file, {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, "2:4")
    assert masks.keys() == {"a"} and masks["a"].tolist() == [[True, False, True, False], [False, False, False, True]]
