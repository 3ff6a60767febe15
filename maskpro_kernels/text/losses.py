"""Losses of a masked language model: cross-entropy with the text, and divergence from the dense model, its teacher."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from ..files import digest, digest_of_named, make_folder, read_record, write_record, write_tensors
from ..modules import MaskedLinear, dense, evaluating
from .batches import drawn_indices
from .perplexity import causal_lm_loss, check_input_ids, predicted_tokens

KINDS = ("ce", "kl", "ce+kl")
# Logits to copy to float32 at a time, such as 128 tokens with a vocabulary of 65,536
PIECE = 1 << 23
# File in a cache's folder with the digest of its teacher
TEACHER = "teacher.json"
# Tokens whose probabilities a cache stores by default
LIKELIEST = 64

# (logits of a piece [tokens, vocabulary] in float32, its row, its tokens) -> (sum of the losses, its gradient)
OfPiece = Callable[[Tensor, int, slice], tuple[Tensor, Callable[[], Tensor]]]


def distillation_loss(
    kind: str = "kl", temperature: float = 1.0, *, ce_weight: float | None = None, cache: TeacherCache | None = None
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Make a ``loss_fn`` of ``MaskTrainer`` for a converted causal language model.

    "ce": ``causal_lm_loss``, the cross-entropy with the text. "kl": the Kullback-Leibler divergence KL(teacher ||
    student) from the dense to the masked model, both softmax(logits / temperature), times temperature^2, which keeps
    the size of its gradients (Hinton, Vinyals and Dean 2015, arXiv 1503.02531). "ce+kl": ``ce_weight`` times "ce" plus
    1 - ``ce_weight`` times "kl". All are means over the next tokens, in nats.

    Args:
        kind: "ce", "kl" or "ce+kl".
        temperature: of "kl", above 0.
        ce_weight: of the cross-entropy in "ce+kl", within (0, 1). Default: 0.5.
        cache: of the teacher's logits; None: the teacher runs a forward in each call.

    Raises:
        ValueError: an argument is not as above, or belongs to another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if ce_weight is not None and kind != "ce+kl":
        raise ValueError(f'ce_weight: expected it only with "ce+kl", got {ce_weight}')
    ce_weight = 0.5 if ce_weight is None else ce_weight
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite float above 0, got {temperature!r}")
    if not isinstance(ce_weight, (int, float)) or not 0 < ce_weight < 1:
        raise ValueError(f"ce_weight: expected a float within (0, 1), got {ce_weight!r}")
    if kind != "ce":
        return DistillationLoss(ce_weight if kind == "ce+kl" else 0.0, float(temperature), cache)
    if temperature != 1 or cache is not None:
        name, value = ("cache", cache) if temperature == 1 else ("temperature", temperature)
        raise ValueError(f'{name}: expected none with "ce", which has no teacher, got {value}')
    return causal_lm_loss


class DistillationLoss:
    """``loss(model, input_ids)`` with the dense model as teacher, see ``distillation_loss``.

    The teacher is the same model under ``dense``, in a forward without a graph. The gradient of the logits is computed
    with the loss, piece by piece, and stored in the dtype of the logits, so that no float32 copy of all logits exists.

    With a cache, all tokens but the teacher's k most likely ones count as one token. This gives a lower bound of the
    divergence (by the log sum inequality). Its gradient is that of the divergence from a teacher that distributes the
    remaining probability as the student does.
    """

    def __init__(self, ce_weight: float, temperature: float, cache: TeacherCache | None):
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.cache = cache

    def settings(self) -> dict:
        """Settings that distinguish runs, as JSON returns them; with a filled cache also its teacher."""
        k, teacher = (None, None) if self.cache is None else (self.cache.k, self.cache.teacher)
        return {"ce_weight": self.ce_weight, "temperature": self.temperature, "k": k, "teacher": teacher}

    labelled_tokens = staticmethod(predicted_tokens)

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """Compute the loss of a batch int64 [batch, length]: 0-dim float32, in nats a token, differentiable once.

        ValueError if kept weights have changed and no cache has the batch.
        """
        check_input_ids(input_ids)
        ce_weight = self.ce_weight
        temperature = self.temperature
        top = None
        if self.cache is None:
            theirs = teacher_logits(model, input_ids)
        else:
            top = self.cache.top(model, input_ids, temperature)
        logits = model(input_ids, use_cache=False).logits
        # a finite minimum: tokens that both exclude by -inf do not differ
        lowest = torch.finfo(torch.float32).min

        def of_piece(values: Tensor, row: int, tokens: slice) -> tuple[Tensor, Callable[[], Tensor]]:
            labels = input_ids[row, 1:][tokens][:, None]
            student = torch.log_softmax(values / temperature, -1)
            if top is None:
                target = torch.log_softmax(theirs[row, tokens].float() / temperature, -1)
            else:
                # the teacher's remaining probability is distributed as the student does
                ids = top.ids[row, tokens].long()
                rest = student.scatter(-1, ids, -math.inf).logsumexp(-1)
                target = student + (top.rest[row, tokens] - rest)[:, None]
                target = target.scatter_(-1, ids, top.log_probs[row, tokens])
            target = target.clamp_(min=lowest)
            student = student.clamp_(min=lowest)
            probabilities = target.exp()
            kl_weight = (1.0 - ce_weight) * temperature
            loss = kl_weight * temperature * (target.sub_(student).mul_(probabilities)).sum()
            if ce_weight:
                text = student if temperature == 1.0 else torch.log_softmax(values, -1)
                loss = loss - ce_weight * text.gather(1, labels).sum()

            def gradient() -> Tensor:
                result = student.exp().sub_(probabilities).mul_(kl_weight)
                if ce_weight:
                    of_text = text.exp().scatter_add_(1, labels, -torch.ones_like(labels, dtype=text.dtype))
                    result.add_(of_text, alpha=ce_weight)
                return result

            return loss, gradient

        return _MeanWithGradient.apply(logits, of_piece)

    def fisher_loss(self, model: nn.Module, input_ids: Tensor, seed: int) -> Tensor:
        """Compute a loss whose squared gradient has the curvature of this loss as its mean over seeds.

        For logits z and q = softmax(z / temperature), KL times temperature^2 has the gradient temperature (q - p) and,
        for any teacher p, the second derivative diag(q) - q q^T. The gradient is 0 at the teacher, so its square gives
        no curvature there. temperature times the cross-entropy with a label y drawn from q has the gradient q - e_y.
        Its square has the mean diag(q) - q q^T: the Fisher information of the student itself (Martens 2014, arXiv
        1412.1193). The same holds for the cross-entropy with the text if labels are drawn at temperature 1. In "ce+kl"
        each token uses one of the two, drawn by their weights. ``seed`` determines the labels, the same on all devices
        for the same logits.
        """
        check_input_ids(input_ids)
        logits = model(input_ids, use_cache=False).logits
        batch, length, _ = logits.shape
        generator = torch.Generator("cpu").manual_seed(seed)
        uniform = torch.rand(2, batch, length - 1, dtype=torch.float64, device="cpu", generator=generator)
        of_text = (uniform[0] < self.ce_weight).to(logits.device)
        temperatures = torch.where(of_text, 1.0, self.temperature)

        def of_piece(values: Tensor, row: int, tokens: slice) -> tuple[Tensor, Callable[[], Tensor]]:
            temperature = temperatures[row, tokens, None]
            log_probs = torch.log_softmax(values / temperature, -1)
            probabilities = log_probs.exp()
            labels = drawn_indices(probabilities, uniform[1, row, tokens])[:, None]
            ones = torch.ones_like(labels, dtype=torch.float32)
            loss = -(temperature * log_probs.gather(1, labels)).sum()
            return loss, lambda: probabilities.scatter_add_(1, labels, -ones)

        return _MeanWithGradient.apply(logits, of_piece)

    def fill(self, model: nn.Module, batches: Sequence[Tensor], progress: bool = False) -> None:
        """Fill the cache with the teacher's logits of the batches, before weights change.

        The model may be converted already. ValueError if there is no cache or one of another model, or kept weights
        have changed.
        """
        if self.cache is None:
            raise ValueError("cache: expected a TeacherCache to fill, got none")
        self.cache.bind(model)
        for batch in tqdm(batches, desc="teacher", unit="batch", disable=not progress, leave=False):
            self.cache.top(model, batch, self.temperature)


def _pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (row, tokens) of logits [batch, length, vocabulary], in pieces; a row's last token has no target."""
    batch, length, vocabulary = logits.shape
    size = max(PIECE // vocabulary, 1)
    for row in range(batch):
        for start in range(0, length - 1, size):
            yield row, slice(start, min(start + size, length - 1))


class _MeanWithGradient(torch.autograd.Function):
    """Mean over next tokens of losses of logits [batch, length, vocabulary]; forward also computes its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, of_piece: OfPiece) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = []
        for row, tokens in _pieces(logits):
            loss, its_gradient = of_piece(logits[row, tokens].float(), row, tokens)
            sums.append(loss)
            if gradient is not None:
                gradient[row, tokens] = its_gradient().to(logits.dtype)
        if gradient is not None:
            gradient[:, -1] = 0.0
        ctx.count = logits.shape[0] * (logits.shape[1] - 1)
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum() / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad / ctx.count), None


def _masked_layers(model: nn.Module) -> list[MaskedLinear]:
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


@torch.no_grad()
def teacher_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the dense model, in eval mode; ValueError if kept weights have changed."""
    with evaluating(model), dense(model) if _masked_layers(model) else nullcontext():
        return model(input_ids, use_cache=False).logits


class TopLogProbs(NamedTuple):
    """The teacher's distributions of next tokens, cut to the k most likely.

    ``ids``, int32, and ``log_probs``, float32 in nats, are [batch, length - 1, k]. ``rest``, float32 [batch, length -
    1], is the log of the total probability of all other tokens.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


class TeacherCache:
    """Cache of the dense model's k most likely next tokens, and the probability of the rest, for repeated batches.

    It costs a forward of the teacher once a batch, and 8 k + 4 bytes a token. After ``bind``, the cache remains valid
    when weights change and the dense model is lost. Batches are recognized by their tokens.

    Args:
        k: number of tokens, at least 1; at most the vocabulary less one.
        folder: folder for a safetensors file a batch, made if missing; all ranks must have access to it. None: in
            memory, on the CPU.

    Raises:
        ValueError: ``k`` is not an int of at least 1.
    """

    def __init__(self, k: int = LIKELIEST, folder: str | Path | None = None):
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected an int of at least 1, got {k!r}")
        self.k = k
        self.folder = None if folder is None else Path(folder)
        self._tops: dict[str, TopLogProbs] = {}
        self._bound: str | None = None
        self._used: str | None = None
        # for each model: its parameters, kept alive so that no new tensor gets the same id; their versions; their
        # digest
        self._digests: WeakKeyDictionary[nn.Module, tuple[list[Tensor], list | None, str]] = WeakKeyDictionary()

    def top(self, model: nn.Module, input_ids: Tensor, temperature: float) -> TopLogProbs:
        """Return the teacher's distributions for a batch, on its device; for a new batch compute and store them.

        ValueError if a batch is new and kept weights have changed, the cache is of another model, or a file of it is
        damaged.
        """
        changed = any(layer.weight_changed for layer in _masked_layers(model))
        teacher = self.teacher if changed else self._teacher_of(model)
        key = f"{digest([input_ids])} {temperature!r} {self.k} {teacher}"
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        path = None
        top = self._tops.get(name)
        if self.folder is not None:
            path = self.folder / f"{name}.safetensors"
            top = _read_top(path) if path.exists() else None
        if top is None:
            if changed:
                raise ValueError(self._lacking("of every batch, got none of this one"))
            top = _top_of(teacher_logits(model, input_ids), self.k, temperature)
            top = TopLogProbs(*(tensor.cpu().contiguous() for tensor in top))
            if path is None:
                self._tops[name] = top
            else:
                make_folder(self.folder)
                tensors = top._asdict()
                write_tensors(tensors, path, {"digest": digest_of_named(tensors)})
        return TopLogProbs(*(tensor.to(input_ids.device) for tensor in top))

    @property
    def teacher(self) -> str | None:
        """Digest of the weights of ``bind``, also after they have changed; None before ``bind``.

        ValueError if its file in the folder is damaged.
        """
        if self._bound is None and self.folder is not None and (path := self.folder / TEACHER).exists():
            try:
                self._bound = read_record(path)["teacher"]
            except ValueError as error:
                raise ValueError(f"cache: {error}") from error
        return self._bound

    def bind(self, model: nn.Module) -> None:
        """Store the digest of the model's weights, which cannot be computed once they change.

        ValueError if kept weights have changed before, or the cache is of another model.
        """
        if any(layer.weight_changed for layer in _masked_layers(model)):
            if self.teacher is None:
                raise ValueError(self._lacking("to be filled in, got none"))
            return
        teacher = self._teacher_of(model)
        if self.teacher is None:
            if self.folder is not None:
                make_folder(self.folder)
                write_record(self.folder / TEACHER, {"teacher": teacher})
            self._bound = teacher

    def _teacher_of(self, model: nn.Module) -> str:
        """Digest of all parameters but the logits of masks; ValueError if the cache is of another model."""
        learned = {id(layer.logits) for layer in _masked_layers(model)}
        # a weight that two modules share is one parameter before a conversion, and two after it
        every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        dense_parameters = [parameter for parameter in every if id(parameter) not in learned and not parameter.is_meta]
        writes = None
        # torch does not count writes to inference tensors
        if not any(parameter.is_inference() for parameter in dense_parameters):
            writes = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in dense_parameters]
        _, before, teacher = self._digests.get(model, (dense_parameters, None, ""))
        if writes is None or before != writes:
            teacher = digest(dense_parameters)
            self._digests[model] = dense_parameters, writes, teacher
        if {self._used, self.teacher} - {None, teacher}:
            raise ValueError(
                "cache: expected logits of this model alone, got some of a model with other weights, or of earlier "
                "weights of this model; use one cache for each"
            )
        self._used = teacher
        return teacher

    def _lacking(self, what: str) -> str:
        where = "" if self.folder is None else f" in {str(self.folder)!r}, a folder that all ranks must have access to"
        return (
            f"cache: expected the dense model's logits {what}{where}, but the weights have changed since; fill it "
            "before they change"
        )


def _read_top(path: Path) -> TopLogProbs:
    """Read the distributions of a batch; ValueError if the file is damaged."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            intact = (file.metadata() or {}).get("digest") == digest_of_named(tensors)
    except SafetensorError:
        intact = False
    if not intact:
        raise ValueError(
            f"cache: expected {str(path)!r} as it was written, got a damaged file; restore it from a copy, or remove "
            "it: if the weights have not changed, it is computed again"
        )
    return TopLogProbs(**tensors)


def _top_of(logits: Tensor, k: int, temperature: float) -> TopLogProbs:
    batch, length, vocabulary = logits.shape
    k = min(k, vocabulary - 1)
    device = logits.device
    top = TopLogProbs(
        torch.empty(batch, length - 1, k, dtype=torch.int32, device=device),
        torch.empty(batch, length - 1, k, dtype=torch.float32, device=device),
        torch.empty(batch, length - 1, dtype=torch.float32, device=device),
    )
    for row, tokens in _pieces(logits):
        values = logits[row, tokens].float()
        ids = _largest(values, k)
        log_probs = torch.log_softmax(values / temperature, -1)
        top.ids[row, tokens] = ids.int()
        top.log_probs[row, tokens] = log_probs.gather(-1, ids)
        # 1 less the others' sum would lose most digits
        top.rest[row, tokens] = log_probs.scatter_(-1, ids, -math.inf).logsumexp(-1)
    return top


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest float32 values, ties to the lower index: values of 16 bits have many ties."""
    bits = values.contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    index = torch.arange(values.shape[-1], device=values.device)
    return (ordered.mul_(1 << 32).sub_(index)).topk(k).indices
