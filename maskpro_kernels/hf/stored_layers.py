"""What a model's config says of its masked and packed layers, so that ``save_pretrained`` loses none."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters import adapter_modules
from ..fsdp import is_distributed
from ..modules import MaskedLinear, masked_layers
from ..packed import SPARSE, NMLinear
from ..ranks import Ranks
from ..safetensors_files import named_files
from ..stored_digests import add_digests
from ..unfuse import taken_apart
from .masked import MaskedConfig
from .packed import PackedConfig


class LiveConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with masked or packed layers, which are looked up when it is written.

    A copy of the model has one of its own. A copy of the config alone, from which another model is made, has none.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    def to_dict(self) -> dict | None:
        """As it is stored; None where the model has no such layers any more.

        Raises:
            ValueError: see ``check_can_be_stored``.
        """
        found = self._found()
        return None if found is None else found.to_dict()

    def _found(self) -> MaskedConfig | PackedConfig | None:
        model = self._model()
        if model is None:
            return None
        check_can_be_stored(model)
        packed = {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}
        if packed:
            return PackedConfig.of(packed, taken_apart(model))
        masked = any(isinstance(module, MaskedLinear) for module in model.modules())
        if masked:
            return MaskedConfig.of(masked_layers(model), taken_apart(model))
        # a dense model with adapters in what is taken apart
        apart = taken_apart(model)
        return PackedConfig({}, apart) if apart else None

    def __deepcopy__(self, memo: dict) -> LiveConfig | None:
        copied = memo.get(id(self._model()))
        return None if copied is None else LiveConfig(copied)

    def __reduce__(self):
        return _as_it_is, (self._found(),)


def _as_it_is(found: MaskedConfig | PackedConfig | None) -> MaskedConfig | PackedConfig | None:
    return found


OWN = (LiveConfig, PackedConfig, MaskedConfig)


def check_no_other_quantization(model: nn.Module) -> None:
    """Raise ValueError if a model is described by another library's ``quantization_config``, which is its only one."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(module, PreTrainedModel) and config is not None and not isinstance(config, OWN):
            raise ValueError(
                f"model: expected one whose config has no quantization_config, got {type(config).__name__}, beside "
                "which masks could not be saved"
            )


def tell_config(model: nn.Module) -> None:
    """Have the configs of a model, and of those within it, tell of masked and packed layers.

    ``from_pretrained`` then gives them back once ``maskpro_kernels.hf`` is imported. ``convert``, ``finalize`` and
    ``pack`` call it for the models within what they are given, and ``save_pretrained`` for the model that it saves.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        told = getattr(module.config, "quantization_config", None)
        if any(isinstance(layer, SPARSE) for layer in module.modules()) or taken_apart(module):
            # parts of a model may share its config, which is then that of the whole
            if not (isinstance(told, LiveConfig) and told._model() is not None and _holds(told._model(), module)):
                module.config.quantization_config = LiveConfig(module)
        elif isinstance(told, OWN) and not (isinstance(told, LiveConfig) and told._model() not in (None, module)):
            _forget(module)


def _holds(model: nn.Module, part: nn.Module) -> bool:
    return any(module is part for module in model.modules())


def check_can_be_stored(model: nn.Module) -> None:
    """Raise ValueError if a checkpoint of the model would not give all of it back."""
    masked = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    if masked and any(isinstance(module, NMLinear) for module in model.modules()):
        raise ValueError("model: expected masked or packed layers, got both; finalize it, or unpack it, first")
    ids: dict[int, str] = {}
    for name, layer in masked.items():
        if layer.is_shard:
            raise ValueError(f"model: expected whole layers, got a shard in {name}")
        other = ids.setdefault(layer.layer, name)
        if other != name:
            raise ValueError(
                f"model: expected a layer id of its own for each layer, got {layer.layer} in {other} and {name}"
            )
    states = {id(layer.counter_state): layer.counter_state for layer in masked.values()}.values()
    counts = {(int(state.seed), int(state.step)) for state in states if not state.seed.is_meta}
    if len(counts) > 1:
        raise ValueError(f"model: expected one seed and one step for all layers, got {sorted(counts)}")


def prepare_for_saving(model: PreTrainedModel) -> None:
    """Have the config of a model tell of masked and packed layers that were put into it by hand as well.

    Raises:
        ValueError: see ``check_can_be_stored`` and ``check_no_other_quantization``; or if adapters of peft stand in a
            model with such layers, whose names in the checkpoint would be those of no module.
    """
    # transformers writes the adapter alone
    if getattr(model, "_hf_peft_config_loaded", False):
        return
    if any(isinstance(layer, SPARSE) for layer in model.modules()):
        within = adapter_modules(model)
        if within:
            raise ValueError(
                "model: expected one without adapters of peft beside its masked or packed layers, got one with "
                f"{min(within)}; save the adapter by save_pretrained of the PeftModel, and the model that its unload() "
                "gives"
            )
        check_no_other_quantization(model)
    check_can_be_stored(model)
    told = getattr(model.config, "quantization_config", None)
    # that of a loaded model stays where it is still right
    if not isinstance(told, (PackedConfig, MaskedConfig)) or told.to_dict() != LiveConfig(model).to_dict():
        tell_config(model)


def _preparing(save: Callable) -> Callable:
    """``save_pretrained`` behind ``prepare_for_saving``, with the digests of what it has written."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike, *args, **kwargs):
        given = signature.bind(self, save_directory, *args, **kwargs)
        gathering = getattr(self.config, "distributed_config", None) is not None
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not (gathering or adapter) and given.arguments.get("state_dict") is None:
            _check_whole(self)
        prepare_for_saving(self)
        if not isinstance(getattr(self.config, "quantization_config", None), OWN):
            return save(*given.args, **given.kwargs)
        if given.arguments.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint: expected False for a model with masked or packed layers, got True, whose "
                "files from_pretrained refuses beside a quantization_config; without it rank 0 writes whole layers"
            )
        # of several processes one writes the config, and beside an adapter alone there is none
        writes = given.arguments.get("is_main_process", True) and not (gathering and Ranks().rank)
        if not writes or adapter:
            return save(*given.args, **given.kwargs)
        with _adding_digests(self, Path(save_directory)):
            return save(*given.args, **given.kwargs)

    return save_pretrained


def _check_whole(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise ValueError(
                f"model: expected whole tensors, got a DTensor in {name}; give state_dict what get_model_state_dict of "
                "torch gathers to rank 0, with full_state_dict=True"
            )


@contextmanager
def _adding_digests(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Add the digests of the weights that are written within it: at its end, or before they go to the hub."""
    before, added = _weights_in(folder), []

    def add() -> None:
        if added:
            return
        written = [file for file, state in _weights_in(folder).items() if before.get(file) != state]
        # a file system may show a file that was written anew as it was: the config is never left without digests
        written = written or named_files(folder)
        if written:
            add_digests(folder, written)
            added.extend(written)

    def upload(*args, **kwargs):
        add()
        return type(model)._upload_modified_files(model, *args, **kwargs)

    # transformers uploads what it has written before it returns
    model._upload_modified_files = upload
    try:
        yield
    finally:
        del model._upload_modified_files
    add()


def _weights_in(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What tells whether a file of weights was written anew."""
    states = {file: file.stat() for file in sorted(folder.glob("*.safetensors"))}
    return {file: (state.st_mtime_ns, state.st_ino, state.st_size) for file, state in states.items()}


# No layer sees the model that it was put into, and transformers asks no one else before it writes the config
PreTrainedModel.save_pretrained = _preparing(PreTrainedModel.save_pretrained)


def _forget(model: PreTrainedModel) -> None:
    if isinstance(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), OWN):
        model.hf_quantizer.remove_quantization_config(model)
    else:
        del model.config.quantization_config
