"""`maskpro export`: the checkpoint of a run, from its logits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoints.logits import Logits, load_logits
from ..digests import digest
from ..files import check_output
from ..functional.masks import top_n_mask
from ..learn.run import JOURNAL
from ..modules import masked_layers
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.finalize import finalize
from ..prune.refit import put_weights
from ..report import FROZEN
from .arguments import DTYPES, new_file, telling, values_kind
from .mask_files import check_mask_options, write_mask
from .models import base_name, check_saving, load, save, told_size
from .run_files import LOGITS, PROGRESS, REPORT, check_ended, digest_of_weights, read_own


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint of a run again, from its base model, its logits, and its weights where they have changed."""
    check_mask_options(args)
    output, values = Path(args.output), values_kind(args)
    if args.to == "mask":
        new_file(args, "output")
    else:
        check_output(output)
        check_saving(args)
    source = Path(args.source) / LOGITS
    if (source.parent / REPORT).is_file() and not source.is_file():
        raise ValueError(f"run: expected {LOGITS} in {args.source!r}, got none; {_cure(source)}")
    check_ended(source.parent, LOGITS)
    with telling("run", _cure(source)):
        learned, pattern = _learned(source)
        _check_own(source.parent, learned)
        codes = {name: top_n_mask(tensor, pattern) for name, tensor in learned.logits.items()}
    metadata = learned.metadata
    if args.to == "mask":
        if learned.weights:
            raise ValueError(
                f"run: expected a mask of the weights of the base model, got {metadata['weights_are']}, which a mask "
                "file does not hold; export a checkpoint, by --to dense or packed"
            )
    dtype = getattr(args, "dtype", metadata["dtype"])
    name = getattr(args, "model", metadata["model"])
    model, tokenizer = _with_masks(name, metadata["dtype"], args, codes, pattern)
    if metadata["dense_weights"] != digest_of_weights(model):
        raise ValueError(
            f"run: expected the weights of {name!r} that its masks were learned on, got others; put back the base "
            "model as it was"
        )
    put_weights(masked_layers(model), learned.weights)
    if metadata["weights"] != digest_of_weights(model):
        raise ValueError(f"run: expected the weights that its masks belong to, {metadata['weights_are']}, got others")
    if dtype != metadata["dtype"]:
        # from the files again: they may hold more than the dtype of the run does
        del model
        model, tokenizer = _with_masks(name, dtype, args, codes, pattern)
        put_weights(masked_layers(model), learned.weights)
    if args.to == "mask":
        write_mask(output, model, codes, pattern, base_name(metadata["model"]), {"run": metadata.get("run")})
        return
    table = read_own(source.parent / REPORT)["table"] if (source.parent / REPORT).is_file() else []
    save(finalize(model, to=args.to, values=values), tokenizer, args, metadata["model"], str(pattern), table)
    of = name + ("" if metadata["weights_are"] == FROZEN else f", {metadata['weights_are']},")
    print(f"{args.to} {pattern} checkpoint of {of} written to {output}")
    if args.to == "packed":
        print(told_size(model))
        print("transformers loads it after `import maskpro_kernels.hf`, and would take random weights without")


def _with_masks(name: str, dtype: str, args: argparse.Namespace, codes: Mapping[str, torch.Tensor], pattern: NMPattern):
    """(Base model of a run with its masks, tokenizer)."""
    model, tokenizer = _base_model(name, dtype, args)
    with telling("run", f"its logits are those of another model than {name!r}"):
        convert(model, pattern, targets=list(codes), init=codes)
    return model, tokenizer


def _base_model(name: str, dtype: str, args: argparse.Namespace):
    """(model, tokenizer) that a run has learned the masks of, which the command or whoever wrote the run has named."""
    if hasattr(args, "model"):
        return load(name, dtype, torch.device("cpu"), args)
    with telling("run", "put back the base model of the run, or name its new place by --model"):
        return load(name, dtype, torch.device("cpu"), args)


def _cure(logits: Path) -> str:
    """How to have the logits of a run again, which are lost or damaged."""
    replay = ", or rebuild it by replay_run" if (logits.parent / PROGRESS / JOURNAL).is_file() else ""
    return f"restore {LOGITS} from a copy{replay}"


def _learned(path: Path) -> tuple[Logits, NMPattern]:
    """What a run has learned, and its pattern; ValueError unless it is of one."""
    learned = load_logits(path)
    logits, metadata = learned.logits, learned.metadata
    missing = {"model", "pattern", "dtype", "weights", "dense_weights", "weights_are"} - metadata.keys()
    if missing or not logits:
        raise ValueError(f"expected logits of `maskpro learn`, got a file without {sorted(missing) or 'any'}")
    if metadata["dtype"] not in DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(DTYPES)}, got {metadata['dtype']!r}")
    for name, tensor in logits.items():
        if not tensor.is_floating_point() or tensor.dim() != 2 or not torch.isfinite(tensor).all():
            raise ValueError(f"expected finite logits [out, K], got {list(tensor.shape)} of {tensor.dtype} in {name}")
    return learned, NMPattern(metadata["pattern"])


def _check_own(run: Path, learned: Logits) -> None:
    """Raise ValueError where the logits in the folder of a run are not those that its report names."""
    if (run / REPORT).is_file():
        logits = digest(learned.logits[name] for name in sorted(learned.logits))
        if logits != read_own(run / REPORT)["logits"]:
            raise ValueError(f"expected the logits that {REPORT} names, got others in {str(run / LOGITS)!r}")
