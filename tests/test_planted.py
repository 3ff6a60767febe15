"""REINFORCE with residual and tracker finds a planted mask; without either it does worse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskpro_kernels import MaskTrainer, NMPattern, Reinforce, convert, expand_mask, pack_mask, top_n_mask
