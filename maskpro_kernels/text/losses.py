"""What a masked language model learns by: cross-entropy with the text, or the divergence from its dense self."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from ..functional.checks import describe
from .inverse_sampling import drawn_indices
from .perplexity import causal_lm_loss, check_input_ids
from .teacher import TeacherCache, TopLogProbs, pieces, teacher_logits

KINDS = ("ce", "kl", "ce+kl")

# (logits of a piece [tokens, vocabulary] in float32, its row, its tokens) -> (sum of the losses, its gradient)
OfPiece = Callable[[Tensor, int, slice], tuple[Tensor, Callable[[], Tensor]]]
# (log-probabilities of the student [tokens, vocabulary], row, tokens) -> those of the teacher
Teacher = Callable[[Tensor, int, slice], Tensor]


def distillation_loss(
    kind: str = "kl", temperature: float = 1.0, *, ce_weight: float | None = None, cache: TeacherCache | None = None
) -> Callable[[nn.Module, Tensor], Tensor]:
    """A ``loss_fn`` of ``MaskTrainer`` for a converted causal language model.

    "ce": ``causal_lm_loss``, the cross-entropy with the text. "kl": the Kullback-Leibler divergence of the masked
    model from the dense one, KL(teacher || student), both softmax(logits / temperature), times temperature^2, which
    keeps the size of its gradients (Hinton, Vinyals and Dean 2015, arXiv 1503.02531). "ce+kl": ``ce_weight`` times the
    one and 1 - ``ce_weight`` times the other. All are means over the next tokens, in nats.

    Args:
        kind: "ce", "kl" or "ce+kl".
        temperature: of "kl", above 0.
        ce_weight: of the cross-entropy in "ce+kl", within (0, 1). Default: 0.5.
        cache: of the teacher's logits; None: the teacher makes a forward in each call.

    Raises:
        TypeError, ValueError: an argument is not as above, or is one of another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if ce_weight is not None and kind != "ce+kl":
        raise ValueError(f'ce_weight: expected none but with "ce+kl", got {ce_weight}')
    ce_weight = 0.5 if ce_weight is None else ce_weight
    for name, value in (("temperature", temperature), ("ce_weight", ce_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {describe(value)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite float above 0, got {temperature}")
    if not 0 < ce_weight < 1:
        raise ValueError(f"ce_weight: expected a float within (0, 1), got {ce_weight}")
    if cache is not None and not isinstance(cache, TeacherCache):
        raise TypeError(f"cache: expected a TeacherCache or None, got {describe(cache)}")
    if kind != "ce":
        return DistillationLoss(ce_weight if kind == "ce+kl" else 0.0, float(temperature), cache)
    if temperature != 1 or cache is not None:
        name, value = ("cache", cache) if temperature == 1 else ("temperature", temperature)
        raise ValueError(f'{name}: expected none with "ce", which has no teacher, got {value}')
    return causal_lm_loss


class DistillationLoss:
    """``loss(model, input_ids)``: how far a masked language model is from its dense self, see ``distillation_loss``.

    The teacher is the model itself under ``dense``, in a forward without a graph. No float32 copy of all logits is
    made: their gradient is found with the loss, piece by piece, and kept in the dtype of the logits.

    With a cache the teacher's tokens but the k likeliest count as one. That is a lower bound of the divergence (by the
    log sum inequality), and its gradient is that of the divergence from a teacher that shares out the rest as the
    student does.
    """

    def __init__(self, ce_weight: float, temperature: float, cache: TeacherCache | None):
        self.ce_weight, self.temperature, self.cache = ce_weight, temperature, cache

    def settings(self) -> dict:
        """What tells runs with this loss from others, as JSON gives it back; of a filled cache the teacher as well."""
        k, teacher = (None, None) if self.cache is None else (self.cache.k, self.cache.teacher)
        return {"ce_weight": self.ce_weight, "temperature": self.temperature, "k": k, "teacher": teacher}

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss of a batch: 0-dim float32, in nats a token, differentiable once.

        Args:
            model: a converted Hugging Face causal language model.
            input_ids: int64 [batch, length], length at least 2, on the model's device; every token counts.

        Raises:
            ValueError: if ``input_ids`` are not as above, or kept weights have changed and no cache has the batch.
        """
        check_input_ids(input_ids)
        teacher = self._teacher(model, input_ids)
        logits = model(input_ids, use_cache=False).logits

        def of_piece(values: Tensor, row: int, tokens: slice) -> tuple[Tensor, Callable[[], Tensor]]:
            labels = input_ids[row, 1:][tokens]
            return _distance(values, labels, teacher, (row, tokens), self.ce_weight, self.temperature)

        return _MeanWithGradient.apply(logits, of_piece)

    def fisher_loss(self, model: nn.Module, input_ids: Tensor, seed: int) -> Tensor:
        """A loss whose gradient squared has the curvature of this one as its mean over seeds.

        KL times temperature^2 has in the logits z, with q = softmax(z / temperature), the gradient temperature (q - p)
        and, whatever the teacher p, the second derivative diag(q) - q q^T. The gradient vanishes at the teacher, its
        square tells nothing there. temperature times the cross-entropy with a label y drawn from q has the gradient
        q - e_y, whose square has the mean diag(q) - q q^T: the Fisher information of the student itself (Martens 2014,
        arXiv 1412.1193). So does the cross-entropy with the text under its own model, at temperature 1: in "ce+kl" each
        token is of one of the two, drawn by their weights.

        Args:
            model, input_ids: as for the loss.
            seed: of the labels, which are the same on every device for the same logits.

        Returns:
            0-dim float32, differentiable once; the mean over the next tokens.
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
        """Have the teacher say what it has to, ahead of a change of the weights.

        Args:
            model: converted or not yet.
            batches: as they will be given to the loss.
            progress: whether to show a bar.

        Raises:
            ValueError: if there is no cache or one of another model, or kept weights have changed.
        """
        if self.cache is None:
            raise ValueError("cache: expected a TeacherCache to fill, got none")
        self.cache.bind(model)
        for batch in tqdm(batches, desc="teacher", unit="batch", disable=not progress, leave=False):
            check_input_ids(batch)
            self.cache.top(model, batch, self.temperature)

    def lacking(self, batches: Sequence[Tensor]) -> list[int]:
        """Indices of the batches about which a cache would have to ask the teacher."""
        return [at for at, batch in enumerate(batches) if not self.cache.holds(batch, self.temperature)]

    def _teacher(self, model: nn.Module, input_ids: Tensor) -> Teacher:
        if self.cache is not None:
            top = self.cache.top(model, input_ids, self.temperature)
            return lambda student, row, tokens: _filled_up(top, student, row, tokens)
        logits = teacher_logits(model, input_ids)

        def whole(_: Tensor, row: int, tokens: slice) -> Tensor:
            return torch.log_softmax(logits[row, tokens].float() / self.temperature, -1)

        return whole


def _filled_up(top: TopLogProbs, student: Tensor, row: int, tokens: slice) -> Tensor:
    """The teacher's log-probabilities, the rest of which is shared out as the student does."""
    ids = top.ids[row, tokens].long()
    rest = student.scatter(-1, ids, -math.inf).logsumexp(-1)
    return (student + (top.rest[row, tokens] - rest)[:, None]).scatter_(-1, ids, top.log_probs[row, tokens])


def _distance(
    values: Tensor, labels: Tensor, teacher: Teacher, place: tuple[int, slice], ce_weight: float, temperature: float
) -> tuple[Tensor, Callable[[], Tensor]]:
    """(sum of the losses of logits [tokens, vocabulary], what gives its gradient)."""
    student = torch.log_softmax(values / temperature, -1)
    # a finite floor: tokens that both exclude by -inf are no difference
    lowest = torch.finfo(torch.float32).min
    target = teacher(student, *place).clamp_(min=lowest)
    student = student.clamp_(min=lowest)
    probabilities = target.exp()
    kl_weight = (1.0 - ce_weight) * temperature
    loss = kl_weight * temperature * (target.sub_(student).mul_(probabilities)).sum()
    if ce_weight:
        text = student if temperature == 1.0 else torch.log_softmax(values, -1)
        loss = loss - ce_weight * text.gather(1, labels[:, None]).sum()

    def gradient() -> Tensor:
        found = student.exp().sub_(probabilities).mul_(kl_weight)
        if ce_weight:
            of_text = text.exp().scatter_add_(1, labels[:, None], -torch.ones_like(labels[:, None], dtype=text.dtype))
            found.add_(of_text, alpha=ce_weight)
        return found

    return loss, gradient


class _MeanWithGradient(torch.autograd.Function):
    """The mean over next tokens of losses of logits [batch, length, vocabulary], whose gradient is found with it."""

    @staticmethod
    def forward(ctx, logits: Tensor, of_piece: OfPiece) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = []
        for row, tokens in pieces(logits):
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
