"""Callbacks for transformers' Trainer, and for other trainers that take its callbacks, such as TRL's."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import TrainerCallback

from ..functional.linear import count_labels
from ..kept_zeros import KeptZeros
from ..learn.backward import check_slope_settings
from ..learn.model_masks import margins
from ..learn.optimizer import MaskOptimizer
from ..modules import MaskedLinear, counter_states, masked_layers
from ..ops.pattern import NMPattern
from ..unfuse import adapter_modules

# Slopes larger than this many root mean squares are rare
LARGE_SLOPE = 30
# Rows of each layer from which the gap of all is estimated
ROWS = 64
# requires_grad of parameters before a callback changed it. Shared: one callback may train a model that another froze
REQUIRED_GRAD = WeakTensorKeyDictionary()


class MaskCallback(TrainerCallback):
    """Make the Trainer learn the masks of a converted model by straight-through, as ``MaskOptimizer`` does.

    ``learning_rate`` is that of the logits, such as 0.3, and follows the Trainer's schedule. The Trainer accumulates
    slopes, averages them over processes, unscales and clips them. Then this callback moves the logits, and the
    Trainer's own optimizer moves nothing. Masks are drawn with the Trainer's ``seed``.

    From the making of the Trainer on, the logits require a gradient and all other parameters are frozen. When training
    ends, each parameter gets its own ``requires_grad`` back. If an error interrupts training, or it never begins, no
    callback is called: ``release`` restores it then, or the end of later training with a MaskCallback.

    It logs, also to ``state.log_history``: ``mask_moved``, the share of groups whose mask differs from that of the
    first step, and ``mask_flip_rate``, the share of groups whose draw differs from the N largest logits. A resumed
    checkpoint continues with the same bits.

    Args:
        curvature, max_update, decay: as for ``StraightThrough``.

    Raises:
        TypeError, ValueError: an argument is not as above. When a Trainer is made or training begins: the model is not
            converted or has adapters, the learning rate is so small that no mask would change, or the Trainer shards
            the model or uses DataParallel.
    """

    def __init__(self, *, curvature: float = 1.0, max_update: float = 2.0, decay: float = 0.9):
        check_slope_settings(curvature, max_update, decay)
        self._slope_settings = {"curvature": curvature, "max_update": max_update, "decay": decay}
        self._changed: list[nn.Parameter] = []
        self._hooks: list = []

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        # before the optimizer is made, and the DDP wrapper, which waits for gradients of all trainable parameters
        self._freeze(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        try:
            self._begin(args, state, model, optimizer)
        except Exception:
            # training that does not begin has no end
            self.release()
            raise

    def _begin(self, args, state, model: nn.Module, optimizer) -> None:
        for option, value in (("fsdp", args.fsdp), ("deepspeed", args.deepspeed)):
            if value:
                raise ValueError(f"{option}: expected none with MaskCallback, which needs whole layers, got {value!r}")
        if args.n_gpu > 1:
            raise ValueError(
                f"model: expected a process for each device, started by torchrun, got one for {args.n_gpu} devices"
            )
        self._freeze(model)
        # without the wrapper of accelerate
        torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        _check_rate(masked_layers(model), torch_optimizer, state.max_steps)
        if state.global_step == 0:
            for counter_state in counter_states(model):
                counter_state.seed.fill_(args.seed)
        for hook in self._hooks:
            # of training that an error ended
            hook.remove()
        self._masks = MaskOptimizer(model, tokens=1.0, **self._slope_settings)
        # filled in place, so that a compiled model stays one graph
        self._tokens = self._masks.slopes.tokens
        self._loss_parts = 1
        count_hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        move_hook = torch_optimizer.register_step_pre_hook(self._move)
        self._hooks = [move_hook, count_hook]

    def _freeze(self, model: nn.Module) -> None:
        logits = {id(layer.logits) for layer in masked_layers(model).values()}
        adapters = adapter_modules(model)
        if adapters:
            raise ValueError(
                f"model: expected none with adapters, which MaskCallback would freeze, got {min(adapters)}; learn the "
                "masks first"
            )
        for parameter in model.parameters():
            is_logits = id(parameter) in logits
            if parameter.requires_grad != is_logits:
                REQUIRED_GRAD[parameter] = parameter.requires_grad
                parameter.requires_grad_(is_logits)
            if parameter in REQUIRED_GRAD:
                self._changed.append(parameter)

    def on_step_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs) -> None:
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        batches = args.gradient_accumulation_steps
        # a stream has no length
        with suppress(TypeError):
            epoch_batches = len(train_dataloader)
            # the last step of an epoch may have fewer batches
            batches = min(batches, epoch_batches - state.global_step % -(-epoch_batches // batches) * batches)
        self._masks.slopes.set_scale(scale / batches)
        self._loss_parts = batches * (args.world_size if args.average_tokens_across_devices else 1)

    @torch.compiler.disable
    def _count(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Set the tokens of a forward's loss; its scale is that of a mean over one batch."""
        items = kwargs.get("num_items_in_batch")
        # a T5 has the loss type of a language model, but does not shift its labels
        shifted = getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")
        shifted = shifted and not getattr(model.config, "is_encoder_decoder", False)
        count = count_labels(kwargs, shifted) if items is None else torch.as_tensor(items) / self._loss_parts
        self._masks.slopes.tokens = None if count is None else self._tokens
        if count is not None:
            self._tokens.copy_(count).clamp_(min=1 / self._loss_parts)

    def _move(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Move the logits instead of the Trainer's optimizer, which then has no gradient."""
        # a fused optimizer also runs with gradients that are not finite, and sets ``found_inf`` then
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            # so that checkpoints save and restore it
            self._masks.state = optimizer.state
            self._masks.move(optimizer.param_groups[0]["lr"])
        self._masks.zero_grad()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            figures = {"mask_moved": self._masks.moved(), "mask_flip_rate": self._masks.flip_rate()}
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.release()

    def release(self) -> None:
        """Restore ``requires_grad`` of all parameters, as the end of training does; call it after an error."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._masks.detach()
        self._hooks = []
        for parameter in self._changed:
            parameter.requires_grad_(REQUIRED_GRAD.pop(parameter, parameter.requires_grad))
        self._changed.clear()


def _check_rate(layers: dict[str, MaskedLinear], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Raise ValueError if the learning rate is too small to change a mask, such as one for weights."""
    group = optimizer.param_groups[0]
    # a schedule may begin at 0
    rate = float(group.get("initial_lr", group["lr"]))
    gap = min(float(margins(layer.logits[:ROWS], layer.pattern).median()) for layer in layers.values())
    if LARGE_SLOPE * rate * max(steps, 1000) < gap or rate <= 0:
        raise ValueError(
            f"learning_rate: expected one for logits, such as 0.3, got {rate:g}: in {steps} steps a logit would move "
            f"by about {rate * steps:.2g}, but the gap of kept and dropped logits is {gap:.2g}"
        )


class KeepMask(TrainerCallback):
    """Keep the zeros of a finalized model while the Trainer fine-tunes it, see ``KeptZeros``.

    Args:
        pattern: "N:M" or NMPattern; the model follows it when training begins.

    Warns:
        UserWarning: when training begins, names layers other than the output head that do not follow the pattern and
            are left out. Also if the weights of all layers that follow it are frozen, as after ``finalize``.

    Raises:
        TypeError, ValueError: ``pattern`` is not a pattern, or when training begins, no layer follows it.
    """

    def __init__(self, pattern: str | NMPattern):
        self.pattern = NMPattern(pattern)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.zeros = KeptZeros(model, self.pattern)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        matrices = self.zeros.held
        left_out = [name for name in self.zeros.left_out if model.get_submodule(name.rpartition(".")[0]) is not head]
        if left_out:
            warnings.warn(
                f"KeepMask: {len(matrices)} matrices follow {self.pattern} and keep their zeros, {len(left_out)} "
                f"do not and are left out: {', '.join(left_out)}",
                stacklevel=2,
            )
        if not any(matrix.get().requires_grad for matrix in matrices.values()):
            warnings.warn(
                f"KeepMask: expected weights that train, got {len(matrices)} frozen ones; call requires_grad_() "
                "on the model before you make the Trainer",
                stacklevel=2,
            )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.zeros.restore()
