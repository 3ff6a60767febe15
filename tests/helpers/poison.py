"""torch with poisoned allocations, which show missing writes, and writes beyond the end."""

from __future__ import annotations

import torch

# Elements after what a kernel may write
MARGIN = 1 << 12
# Bytes of outputs that are kept to be checked together, and how many of the newest may not be written yet
MOST_KEPT = 1 << 30
NEWEST = 8


def poison_of(dtype):
    """NaN, or the integer with all bits set."""
    return torch.nan if dtype.is_floating_point else -1 if dtype.is_signed else 255


class PoisonedTorch:
    """torch with allocations that hold poison, and on a CPU more of it after them.

    What is checked later must be kept until then. A GPU's memory is not: tests measure it.
    """

    def __init__(self):
        self.buffers, self.bytes = [], 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        margin = MARGIN if device is None or torch.device(device).type == "cpu" else 0
        buffer = torch.empty(shape.numel() + margin, dtype=dtype, device=device)
        buffer.fill_(poison_of(buffer.dtype))
        if not margin:
            return buffer.view(shape)
        self.buffers.append(buffer)
        self.bytes += buffer.nbytes
        if self.bytes > MOST_KEPT:
            self.check_margins(but=NEWEST)
        return buffer[: shape.numel()].view(shape)

    def empty_like(self, tensor):
        return self.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def check_margins(self, but=0):
        """Check all but the newest allocations, and free them."""
        checked = self.buffers[: len(self.buffers) - but]
        for buffer in checked:
            margin = buffer[-MARGIN:]
            intact = margin.isnan() if buffer.dtype.is_floating_point else margin == poison_of(buffer.dtype)
            assert intact.all(), f"a kernel wrote beyond the end of its output in {buffer.dtype}"
        del self.buffers[: len(checked)]
        self.bytes = sum(buffer.nbytes for buffer in self.buffers)
