"""`maskpro export`: the checkpoint of a run, or its mask alone, from its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.logits import LOGITS_FILE, logits_of_run
from ..checkpoints.mask_file import save_masks
from ..files import check_output, digest
from ..functional.masks import top_n_mask
from ..modules import masked_layers, tensors_of_base
from ..ops.cpu import cpu_multiplies
from ..ops.pattern import NMPattern
from ..packed import INT4, KEEP
from ..prune.convert import convert, replace_layers
from ..prune.finalize import finalize, int8_output_layer, output_layer_of
from ..prune.refit import put_weights
from ..text.batches import MixedBatches, parse_sources
from ..text.sources import SELF, load_text
from .config import DTYPES, Export
from .inputs import (
    PROGRESS,
    REPORT,
    SETTINGS,
    Progress,
    base_name,
    check_new_file,
    digest_of_weights,
    load,
    naming,
    packed_size,
    read_json,
    read_report,
    read_samples,
    report_as,
    report_damaged_settings,
    save,
    windows_of,
)

# Windows by which int4 values are rounded, most tokens of each, and windows of a batch
WINDOWS = 128
LENGTH = 128
BATCH_SIZE = 16


def export(options: Export, source: str, output: str) -> None:
    """Write the result of a run from its base model, its logits, and its weights if they have changed."""
    if options.values != KEEP and options.to != "packed":
        raise ValueError(f"values: expected none without --to packed, got {options.values!r}")
    if options.output_layer != KEEP and options.to != "packed":
        raise ValueError(f"output_layer: expected none without --to packed, got {options.output_layer!r}")
    check_new_file(output) if options.to == "mask" else check_output(output)
    if not (Path(source) / LOGITS_FILE).is_file():
        read_report(Path(source))
        raise ValueError(f"run: expected {LOGITS_FILE} in {source!r}, got none; restore it from a copy")
    report_damaged_settings(Path(source))
    if (Path(source) / REPORT).is_file():
        table = read_report(Path(source))["table"]
    else:
        table = ()
        report_as("warning", f"{source!r} has no {REPORT}: a model card has no perplexities")
    with naming("run"):
        learned = logits_of_run(Path(source))
        metadata = learned.metadata
        lacking = {"model", "pattern", "dtype", "weights", "base"} - metadata.keys()
        if lacking or not learned.logits or metadata["dtype"] not in DTYPES:
            raise ValueError(f"expected logits of `maskpro learn`, got a file without {sorted(lacking) or 'any'}")
        pattern = NMPattern(metadata["pattern"])
        if not all(logits.dim() == 2 and logits.isfinite().all() for logits in learned.logits.values()):
            raise ValueError("expected finite logits [out, K], got others")
        codes = {name: top_n_mask(logits, pattern) for name, logits in learned.logits.items()}
    if options.to == "mask" and learned.weights:
        raise ValueError("run: expected a mask of the base model's weights, got changed weights; export a checkpoint")
    name = options.model or metadata["model"]
    model, tokenizer = _with_masks(name, metadata["dtype"], codes, pattern, metadata["base"])
    put_weights(masked_layers(model), learned.weights)
    if metadata["weights"] != digest_of_weights(model):
        raise ValueError("run: expected the weights that its masks were learned on, got others")
    dtype = options.dtype or metadata["dtype"]
    # rounding runs the model
    rounding_dtype = "float32" if options.values == INT4 and not cpu_multiplies(DTYPES[dtype]) else dtype
    if rounding_dtype != metadata["dtype"]:
        # load again: the files may have more digits than the dtype of the run
        del model
        model, tokenizer = _with_masks(name, rounding_dtype, codes, pattern)
        put_weights(masked_layers(model), learned.weights)
    if options.to == "mask":
        weights = {key: layer.weight.detach() for key, layer in masked_layers(model).items()}
        layers = ((key, code, weights[key]) for key, code in codes.items())
        with naming("output"):
            save_masks(output, layers, pattern, model=base_name(name), provenance={"run": metadata.get("run")})
        print(f"{pattern} mask of {name} written to {output}, {Path(output).stat().st_size / 1e6:.2f} MB")
        return
    calibration = calibration_of(Path(source), model, tokenizer) if options.values == INT4 else None
    progress = Progress("rounding", "layer")
    output_layer = options.output_layer
    beside_packed = output_layer
    if rounding_dtype != dtype and output_layer != KEEP:
        # rounded below, in the dtype of the checkpoint; but refused before the other layers, which take long
        output_layer_of(model)
        beside_packed = KEEP
    finalize(model, options.to, options.values, calibration=calibration, progress=progress, output_layer=beside_packed)
    if rounding_dtype != dtype:
        rounded = model
        # other weights have the digits of the files, and some models keep float32 for a few
        model, tokenizer = _with_masks(name, dtype, codes, pattern)
        layers = masked_layers(model).items()
        replacements = {id(layer): rounded.get_submodule(key).to(DTYPES[dtype]) for key, layer in layers}
        if output_layer != KEEP:
            replacements |= int8_output_layer(model)
        replace_layers(model, replacements)
    if options.values != KEEP or output_layer != KEEP:
        table = [{**row, "method": f"{row['method']}, before rounding"} for row in table]
    save(model, tokenizer, output, name, str(pattern), table)
    print(f"{options.to} {pattern} checkpoint of {name} written to {output}")
    if options.to == "packed":
        print(packed_size(model))
        print("transformers loads it after `import maskpro_kernels.hf`")


def _with_masks(name: str, dtype: str, codes: Mapping[str, Tensor], pattern: NMPattern, base: str | None = None):
    """Load (base model of a run with its masks, tokenizer); ValueError if it is not that of the digest ``base``."""
    with naming("run", "restore the base model of the run, or name its new place by --model"):
        model, tokenizer = load(name, dtype, "cpu")
        if base not in (None, digest(tensors_of_base(model))):
            raise ValueError(f"expected the base model that its masks were learned on, got other weights in {name!r}")
        convert(model, pattern, targets=list(codes), init=codes)
    return model, tokenizer


def calibration_of(run: Path, model: nn.Module, tokenizer) -> Sequence[Tensor]:
    """Make the batches by which int4 values of a run are rounded: of the windows that it learns from, by their shares.

    Windows are int64 [BATCH_SIZE, at most LENGTH]; those of short texts come several times.

    Raises:
        ValueError, OSError: if a text or the samples of the run cannot be read.
    """
    with naming("run", "restore the data of the run, or round without it: maskpro import --values int4"):
        settings = read_json(run / SETTINGS)["options"]
        windows = {}
        sources = parse_sources(settings["data"])
        length = min(LENGTH, settings["seq_len"])
        for name, _ in sources:
            if name != SELF:
                text = load_text(name, documents=settings["documents"])["calibration"]
                windows[name] = windows_of(text, model, tokenizer, length, "run")
            elif (samples := read_samples(run / PROGRESS)) is None:
                raise ValueError(f"expected samples of the dense model in {str(run / PROGRESS)!r}, got none")
            else:
                # without a text the first ones are for evaluation
                held_out = 2 * settings["eval_windows"] if len(sources) == 1 else 0
                windows[name] = samples[held_out:][-WINDOWS:, :length]
        return torch.cat(list(MixedBatches(windows, sources, 1, WINDOWS, seed=0))).split(BATCH_SIZE)
