"""The dense model as the teacher of its masked self, and its logits kept in short."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..dense_forward import dense
from ..digests import digest
from ..files import make_folder, write_whole
from ..functional.checks import describe
from ..modules import MaskedLinear, evaluating

# Logits that stand as float32 copies at a time: those of 128 tokens and a vocabulary of 65,536
PIECE = 1 << 23
# In the folder of a cache, whose logits it holds
TEACHER = "teacher.json"
# How many next tokens are held where nothing else is said
LIKELIEST = 64


class TopLogProbs(NamedTuple):
    """The teacher's distributions of the next tokens in short.

    Attributes:
        ids: int32 [batch, length - 1, k], of the likeliest tokens.
        log_probs: float32 [batch, length - 1, k], in nats.
        rest: float32 [batch, length - 1], log of what all other tokens have together.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


class _Known(NamedTuple):
    """The digest of a model, for as long as no parameter has been written to.

    Attributes:
        parameters: held, for a new one could have the place of one that is gone.
        writes: see ``_writes``.
        digest: of the parameters.
    """

    parameters: list[Tensor]
    writes: list[tuple[int, int, int]] | None
    digest: str


def _writes(tensors: list[Tensor]) -> list[tuple[int, int, int]] | None:
    """What changes where a tensor is written to or replaced; None where torch does not count."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]


def pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, tokens) of logits [batch, length, vocabulary], in pieces; the last token of a row predicts none."""
    batch, length, vocabulary = logits.shape
    size = max(PIECE // vocabulary, 1)
    for row in range(batch):
        for start in range(0, length - 1, size):
            yield row, slice(start, min(start + size, length - 1))


def masked_layers_of(model: nn.Module) -> list[MaskedLinear]:
    """The masked layers of a model; of one that is not converted none."""
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


def _have_changed(model: nn.Module) -> bool:
    return any(layer.weight_changed for layer in masked_layers_of(model))


@torch.no_grad()
def teacher_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the dense model, in eval mode, see ``dense``.

    Raises:
        ValueError: if kept weights have changed.
    """
    with evaluating(model), dense(model) if masked_layers_of(model) else nullcontext():
        return model(input_ids, use_cache=False).logits


def bytes_a_token(k: int = LIKELIEST) -> int:
    """What a ``TeacherCache`` holds of a token: an index and a float32 for each of the k, and the rest's mass."""
    return 8 * k + 4


class TeacherCache:
    """The dense model's k likeliest next tokens and the mass of the rest, for batches that are seen again.

    It costs a teacher's forward once a batch, and ``bytes_a_token(k)``. What it holds outlives a change of the
    weights, behind which there is no dense model, if it was bound to that before. A batch is known again by its tokens.

    Args:
        k: tokens, at least 1; of a vocabulary that has no more, all but one.
        folder: where a safetensors file a batch is kept, made if missing; on several ranks one that all of them see.
            None: in memory, on the CPU.

    Raises:
        TypeError, ValueError: ``k`` is no int of at least 1.
    """

    def __init__(self, k: int = LIKELIEST, folder: str | Path | None = None):
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected an int, got {describe(k)}")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        self.k = k
        self.folder = None if folder is None else Path(folder)
        self._held: dict[str, TopLogProbs] = {}
        self._teacher: str | None = None
        self._bound: str | None = None
        self._digests: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()

    def top(self, model: nn.Module, input_ids: Tensor, temperature: float) -> TopLogProbs:
        """What the teacher has said of a batch, on its device; a batch that is new is added.

        Args:
            model: the student, or the dense model before it is converted.
            input_ids: int64 [batch, length].
            temperature: by which the logits are divided.

        Raises:
            ValueError: if a batch is new and kept weights have changed, or what is held is damaged or of another
                model.
            OSError: if a file cannot be read or written.
        """
        changed = _have_changed(model)
        teacher = self.teacher if changed else self._digest_of(model)
        if teacher is not None:
            self._check_teacher(teacher)
        name = self._name(input_ids, temperature)
        held = None if teacher is None else self._read(name)
        if held is None:
            if changed:
                raise ValueError(self._lacking("of every batch, got none of this one"))
            held = _top_of(teacher_logits(model, input_ids), self.k, temperature)
            self._keep(name, held)
        return TopLogProbs(*(tensor.to(input_ids.device) for tensor in held))

    def holds(self, input_ids: Tensor, temperature: float) -> bool:
        """Whether ``top`` needs no teacher, with arguments as there."""
        name = self._name(input_ids, temperature)
        return name in self._held if self.folder is None else self._path(name).exists()

    @property
    def teacher(self) -> str | None:
        """The digest of the weights that ``bind`` was given, also once they are gone; None before.

        Raises:
            ValueError: if its file is damaged.
        """
        if self._bound is None and self.folder is not None and (path := self.folder / TEACHER).exists():
            try:
                self._bound = str(json.loads(path.read_bytes())["teacher"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(_damaged(path)) from None
        return self._bound

    def bind(self, model: nn.Module) -> None:
        """Write down whose logits these are: once its weights have changed, nothing else tells.

        Raises:
            ValueError: if kept weights have changed before, or the cache is of another model.
            OSError: if that cannot be written.
        """
        if _have_changed(model):
            if self.teacher is None:
                raise ValueError(self._lacking("to be filled in, got none"))
            return
        teacher = self._digest_of(model)
        self._check_teacher(teacher)
        if self.teacher is None:
            if self.folder is not None:
                make_folder(self.folder)
                write_whole(self.folder / TEACHER, json.dumps({"teacher": teacher}).encode())
            self._bound = teacher

    def _digest_of(self, model: nn.Module) -> str:
        """Of all parameters but the logits of masks; anew where one may have been written to, or is another one."""
        learned = {id(layer.logits) for layer in masked_layers_of(model)}
        # a weight that two modules share is one parameter before a conversion, and two behind it
        every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        own = [parameter for parameter in every if id(parameter) not in learned and not parameter.is_meta]
        writes = _writes(own)
        known = self._digests.get(model)
        if known is None or writes is None or known.writes != writes:
            known = self._digests[model] = _Known(own, writes, digest(own))
        return known.digest

    def _check_teacher(self, teacher: str) -> None:
        """Raise ValueError unless all that is held is of that teacher."""
        if {self._teacher, self.teacher} - {None, teacher}:
            raise ValueError(
                "cache: expected logits of this model alone, got some of a model with other weights, or from before "
                "this one's were written to; give each a cache of its own"
            )
        self._teacher = teacher

    def _lacking(self, what: str) -> str:
        where = "" if self.folder is None else f" in {str(self.folder)!r}, a folder that all ranks have to see"
        return (
            f"cache: expected the dense model's logits {what}{where}, and the weights have changed since; fill it "
            "before they do"
        )

    def _name(self, input_ids: Tensor, temperature: float) -> str:
        key = f"{digest([input_ids])} {temperature!r} {self.k}"
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _keep(self, name: str, top: TopLogProbs) -> None:
        tensors = {field: tensor.cpu().contiguous() for field, tensor in top._asdict().items()}
        if self.folder is None:
            self._held[name] = TopLogProbs(**tensors)
            return
        make_folder(self.folder)
        write_whole(
            self._path(name), save(tensors, metadata={"teacher": self._teacher, "digest": digest(tensors.values())})
        )

    def _read(self, name: str) -> TopLogProbs | None:
        if self.folder is None:
            return self._held.get(name)
        path = self._path(name)
        if not path.exists():
            return None
        content = path.read_bytes()
        try:
            top = TopLogProbs(**load(content))
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + size])["__metadata__"]
            sound = metadata["digest"] == digest(top)
            teacher = metadata["teacher"]
        except (SafetensorError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise ValueError(_damaged(path))
        self._check_teacher(teacher)
        return top


def _damaged(path: Path) -> str:
    return f"cache: expected a file as it was written, got a damaged one, {str(path)!r}: remove it"


def _top_of(logits: Tensor, k: int, temperature: float) -> TopLogProbs:
    batch, length, vocabulary = logits.shape
    k = min(k, vocabulary - 1)
    at = {"device": logits.device}
    top = TopLogProbs(
        torch.empty(batch, length - 1, k, dtype=torch.int32, **at),
        torch.empty(batch, length - 1, k, dtype=torch.float32, **at),
        torch.empty(batch, length - 1, dtype=torch.float32, **at),
    )
    for row, tokens in pieces(logits):
        values = logits[row, tokens].float()
        ids = _largest(values, k)
        log_probs = torch.log_softmax(values / temperature, -1)
        top.ids[row, tokens] = ids.int()
        top.log_probs[row, tokens] = log_probs.gather(-1, ids)
        # not 1 less the others' sum, of which few digits would be left
        top.rest[row, tokens] = log_probs.scatter_(-1, ids, -math.inf).logsumexp(-1)
    return top


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest float32 values, ties to the lower index: those of 16 bits have many."""
    bits = values.contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    index = torch.arange(values.shape[-1], device=values.device)
    return (ordered.mul_(1 << 32).sub_(index)).topk(k).indices
