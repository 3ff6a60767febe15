"""Models in and out; transformers takes seconds to import, and a wrong argument or --help does not wait for it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..checkpoints.mask_file import is_mask_file
from ..packed import INT8, NMLinear, bits_a_weight
from ..text.batches import check_vocabulary, windows
from .arguments import DTYPES, telling
from .progress import tell_as


def load(name: str, dtype: str | None, device: torch.device, args: argparse.Namespace):
    """(model, tokenizer) on a device, see ``hf.load_model``.

    Args:
        args: tell whether transformers draws its bars, here and when the model is saved.
    """
    model, tokenizer = load_spread(name, dtype, None, args)
    return model.to(device), tokenizer


def load_spread(name: str, dtype: str | None, device_map: str | Mapping | None, args: argparse.Namespace):
    """The same, spread over devices by the ``device_map`` of ``hf.load_model``."""
    from ..hf import load_model, show_bars

    if is_mask_file(name):
        raise ValueError(
            f"model: expected a model, got {name!r}, a mask file; put it on its model first, by `maskpro import "
            f"{shlex.quote(name)} --model MODEL --output OUTPUT`, and give OUTPUT"
        )
    show_bars(args.bars)
    return load_model(name, None if dtype is None else DTYPES[dtype], device_map=device_map)


def device_of_inputs(model: torch.nn.Module) -> torch.device:
    """Where the tokens of a model belong, which may be spread over several devices."""
    return model.get_input_embeddings().weight.device


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Have a model compute its activations anew in backward, see ``hf.checkpoint_activations``."""
    from ..hf import checkpoint_activations

    checkpoint_activations(model)


def is_path_of_model(name: str) -> bool:
    """Whether a model is taken from a path, by the rules of ``hf.load_model``."""
    from ..hf import SMOLLM2

    return name != SMOLLM2 and Path(name).exists()


def hub_id(name: str) -> str | None:
    """The id on the hub of a model that ``load`` takes from there, or whose weights are of there; None of a folder."""
    from ..hf import SMOLLM2

    if name == SMOLLM2:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    only_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return None if is_path_of_model(name) or only_path else name


def base_name(model: str) -> str:
    """The name of a base model, without the folders of this machine."""
    return hub_id(model) or Path(model).name


def check_saving(args: argparse.Namespace) -> None:
    """Raise unless a checkpoint can be pushed to the hub, as options of ``add_saving`` say."""
    if hasattr(args, "push_to_hub"):
        from huggingface_hub import HfApi

        try:
            HfApi().whoami()
        except Exception as error:
            raise ValueError(f"push_to_hub: expected a login that the hub takes, got none: {error}") from error
    elif hasattr(args, "private"):
        raise ValueError("private: expected none without --push-to-hub, got it; leave it out")


def save(
    model: torch.nn.Module,
    tokenizer,
    args: argparse.Namespace,
    base: str,
    pattern: str,
    table: Sequence[Mapping] = (),
) -> None:
    """Write a checkpoint into ``args.output``, as options of ``add_saving`` say, see ``hf.save_model``."""
    from ..hf import save_model

    options = {
        name: getattr(args, name) for name in ("max_shard_size", "push_to_hub", "private") if hasattr(args, name)
    }
    rows = [
        {"mask": row["method"]} | {name: row[name] for name in ("perplexity", "other_perplexity") if name in row}
        for row in table
    ]
    with telling("output"):
        save_model(model, tokenizer, args.output, base_model=base_name(base), pattern=pattern, table=rows, **options)


def told_size(model: torch.nn.Module) -> str:
    """What the packed layers of a model take, beside what they would take dense."""
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    weights, bits = sum(layer.packed.shape.numel() for layer in layers), bits_a_weight(layers)
    dtype = layers[0].packed.dtype
    dense = 8 * dtype.itemsize
    integers = sum(layer.kind == INT8 for layer in layers)
    rounded = f", values of {integers} rounded to int8" if integers else ""
    return (
        f"{len(layers)} packed layers take {bits:.2f} bits a weight, {bits * weights / 8e6:.2f} MB, where dense "
        f"{str(dtype).removeprefix('torch.')} takes {dense} bits, {dense * weights / 8e6:.2f} MB{rounded}"
    )


def learned_positions(model: torch.nn.Module) -> int | None:
    """How many tokens a model has embeddings of positions for; None where positions are computed."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # some have two more, by which they count padding
    return most if most is not None and any(most <= count <= most + 2 for count in tables) else None


def check_positions(model: torch.nn.Module, **lengths: int) -> None:
    """Raise ValueError unless a model has positions for windows of these lengths, each by the name of its option."""
    positions = learned_positions(model)
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise ValueError(f"{name}: expected at most {positions}, which the model has positions for, got {length}")


def tell_beyond_context(model: torch.nn.Module, name: str, length: int) -> None:
    """Warn of windows that are longer than a model's context, where its positions are computed.

    Args:
        name: the argument that the length comes from.
    """
    config = getattr(model.config, "text_config", None) or model.config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        tell_as(
            "warning",
            f"{name}: expected windows of at most {most} tokens, the model's context (max_position_embeddings), got "
            f"{length}; it may not have learned the positions beyond, and do worse there",
        )


def windows_of(text: str, model: torch.nn.Module, tokenizer, length: int, data: str, option: str) -> torch.Tensor:
    """``batches.windows`` for a model that has positions for that length.

    Args:
        data: the argument that the text comes from, for errors.
        option: that of the length.

    Raises:
        ValueError: if the text is too short, or the model does not have one of its tokens.
    """
    with telling(data, f"give a longer text, or a smaller {option}"):
        found = windows(text, tokenizer, length)
    check_vocabulary(found, model.get_input_embeddings().num_embeddings)
    return found
