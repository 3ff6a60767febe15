"""Causal language models without weights: what their config tells of shapes, and of what a forward holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .foreign_code import ForeignCode, files_of_code, is_refusal
from .loading import SMOLLM2, check_model, gguf_of_smollm2, on_meta, only_errors_told


def read_config(name: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a causal language model; its weights and tokenizer need not be there.

    Args:
        name, dtype, trust_remote_code: as for ``load_model``.

    Raises:
        ForeignCode: as ``load_model``.
        ValueError, OSError: if there is no such config, or it is none of a causal language model whose weights are
            dense.
    """
    options = {}
    if name == SMOLLM2:
        folder, gguf = gguf_of_smollm2()
        name, options = str(folder), {"gguf_file": gguf}
    else:
        check_model(name)
    with _telling(name), only_errors_told():
        config = AutoConfig.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not options:
        kind = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise ValueError(
            f"model: expected one whose weights are dense, got {name!r}, stored by {kind!r}; give the model that it is "
            "made of"
        )
    return config


def model_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device, in eval mode.

    Raises:
        ForeignCode: as ``load_model``.
        ValueError: if it makes no causal language model.
    """
    with _telling(config.name_or_path), only_errors_told():
        return on_meta(config, trust_remote_code).eval()


@contextmanager
def model_of_fake_tensors(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Iterator[PreTrainedModel]:
    """A model of fake tensors on the CPU, in eval mode: operations find shapes, and compute nothing.

    Its forward takes the ways of a CPU, where attention holds no matrix of its weights. While it lasts, tensors that
    are made are such too.

    Raises:
        ForeignCode: as ``load_model``.
        ValueError: if it makes no causal language model, or a forward looks at what is in tensors, or fails.
    """
    # what it cannot do is told by its exceptions
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with FakeTensorMode():
            with _telling(config.name_or_path), only_errors_told():
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
            try:
                yield model
            # of whatever kind: the forward is that of a model of anybody's
            except Exception as error:
                raise ValueError(
                    f"model: expected one whose forward runs on shapes alone, got {type(model).__name__}: "
                    f"{_first_sentence(error)}; take another --dtype, or ask `maskpro learn`, which tells it too"
                ) from error
    finally:
        log.setLevel(before)


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Each parser of transformers has errors of its own."""
    try:
        yield
    except Exception as error:
        if is_refusal(error):
            raise ForeignCode(name, files_of_code(name)) from error
        told = f"model: expected the config of a causal language model, got that of {name!r}: {_first_sentence(error)}"
        raise (OSError if isinstance(error, OSError) else ValueError)(told) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
