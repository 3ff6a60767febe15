"""The model card of a saved model: README.md beside its weights, as the hub shows it."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import write_whole
from ..modules import MaskedLinear
from ..ops.reference import SCALED
from ..packed import INT8, NMLinear, bits_a_weight
from .output_head import has_dense_head

CARD = "README.md"
OWN = re.compile(r"\n<!-- written by maskpro_kernels, ([0-9a-f]{16}): a card that was changed is kept -->\n\Z")
MASK_ALONE = "The mask alone: each weight that is kept is that of the base model."
MASK_ALONE_ROUNDED = f"{MASK_ALONE.removesuffix('.')}, apart from the rounding to int8."
DENSE = "none (dense)"
BEFORE_ROUNDING = "Found before values were rounded to int8."
IMPORT = "import maskpro_kernels.hf  # pip install 'maskpro-kernels[hf]'"


@dataclass(frozen=True)
class Origin:
    """What a model card tells of a model that the model itself does not. What is left out there is left out.

    Attributes:
        base_model: id on the hub, or another name, of the dense model.
        on_hub: whether it is an id on the hub, to which the card then links.
        pattern: "N:M" of the layers with a mask.
        changed: in sentences, whether kept weights are those of the base model, such as MASK_ALONE.
        rounded: whether values were rounded to int8 before they were stored as they are now.
        table: rows of a table of perplexities, {"method": ..., "perplexity": ...} each, which may have
            "other_perplexity" too.
        texts: the names of the texts of these one or two columns.
        settings: by which the mask was learned.
        versions: of the packages.
    """

    base_model: str | None = None
    on_hub: bool = False
    pattern: str | None = None
    changed: str | None = None
    rounded: bool = False
    table: Sequence[Mapping] = ()
    texts: Sequence[str] = ("test text", "another text")
    settings: Mapping = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def write_card(model: PreTrainedModel, folder: str | Path, name: str, origin: Origin) -> bool:
    """Write README.md into the folder of a checkpoint; gives whether it did.

    Args:
        model: as it was saved.
        folder: of its checkpoint.
        name: under which it will be loaded.
        origin: of the model.

    Warns:
        UserWarning: if there is a README.md that this function has not written, or that was changed since. It stays.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(folder) / CARD
    if path.exists() and not is_own(path.read_text(encoding="utf-8", errors="replace")):
        warnings.warn(
            f"{path} is kept, since someone else has written or changed it: the model card is left out; move it away "
            "for a new one",
            stacklevel=3,
        )
        return False
    text = card_text(model, Path(folder), name, origin)
    mark = f"\n<!-- written by maskpro_kernels, {_digest(text)}: a card that was changed is kept -->\n"
    write_whole(path, (text + mark).encode())
    return True


def is_own(text: str) -> bool:
    """Whether a card is as ``write_card`` has written it."""
    found = OWN.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def card_text(model: PreTrainedModel, folder: Path, name: str, origin: Origin) -> str:
    """The card, with its metadata in front."""
    patterns = _patterns(model) or ([origin.pattern] if origin.pattern else [])
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    data = ModelCardData(
        base_model=origin.base_model if origin.on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=["maskpro", "sparse", "semi-structured-sparsity", *patterns],
    )
    sections = [
        _headline(model, folder, name, origin, patterns),
        _perplexities(model, origin),
        _loading(model, name, "AutoModelForCausalLM" if causal else type(model).__name__),
        _listed("Settings", origin.settings),
        _listed("Versions", origin.versions),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _layers(model: PreTrainedModel, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


def _patterns(model: PreTrainedModel) -> list[str]:
    return sorted({str(layer.pattern) for layer in _layers(model, (MaskedLinear, NMLinear))})


def _headline(model: PreTrainedModel, folder: Path, name: str, origin: Origin, patterns: Sequence[str]) -> str:
    of = f"`{origin.base_model}`" if origin.base_model else "a dense model"
    if origin.base_model and origin.on_hub:
        of = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})"
    lines = [f"# {name}"]
    if patterns:
        kept = " and ".join("{} of every {}".format(*pattern.split(":")) for pattern in patterns)
        dense = "Embeddings and the output head" if has_dense_head(model, patterns, folder) else "Embeddings"
        lines.append(
            f"This is {of} with {' and '.join(patterns)} sparsity: of consecutive weights along a layer's input, "
            f"{kept} are kept, and the others are zero. {dense} are dense."
        )
    else:
        lines.append(f"This is {of}, saved by `maskpro_kernels`.")
    if origin.changed:
        rounded = _is_rounded(model, origin)
        lines.append(origin.changed.replace(MASK_ALONE, MASK_ALONE_ROUNDED) if rounded else origin.changed)
    lines.append(_form(model))
    return "\n\n".join(lines)


def _form(model: PreTrainedModel) -> str:
    masked, packed = _layers(model, MaskedLinear), _layers(model, NMLinear)
    if masked:
        return (
            f"The checkpoint holds whole weights, and the logits of the masks of {len(masked)} layers. In eval mode "
            "the masks are those of the largest logits; in training mode they are drawn."
        )
    if packed:
        dense = 8 * packed[0].packed.dtype.itemsize
        return (
            f"The checkpoint holds {len(packed)} layers packed: the kept values, and one bit for each weight. That is "
            f"{bits_a_weight(packed):.2f} bits a weight, where dense takes {dense}. {_rounded(packed)}Without "
            "`maskpro_kernels` transformers would take random weights for them."
        )
    return "The checkpoint is dense: zeros are stored as any other value, and any program loads it."


def _is_rounded(model: PreTrainedModel, origin: Origin) -> bool:
    return origin.rounded or bool(_rounded(_layers(model, NMLinear)))


def _rounded(packed: Sequence[NMLinear]) -> str:
    """What is said of int8 values, if there are any."""
    integers = sum(layer.kind == INT8 for layer in packed)
    if not integers:
        return ""
    which = "The kept values" if integers == len(packed) else f"The kept values of {integers} of them"
    return (
        f"{which} are rounded to int8, with one scale for each {SCALED} of a row: each is off by half of it at most. "
    )


def _perplexities(model: PreTrainedModel, origin: Origin) -> str:
    if not origin.table:
        return ""
    names = ["perplexity", "other_perplexity"]
    columns = {
        name: text
        for name, text in zip(names, origin.texts, strict=False)
        if all(name in row for row in origin.table)
    }  # fmt: skip
    lines = [
        "## Perplexity",
        "",
        "Of held-out text; lower is better." + (f" {BEFORE_ROUNDING}" if _is_rounded(model, origin) else ""),
        "",
        "| mask | " + " | ".join(columns.values()) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in origin.table:
        mask = DENSE if row["method"] == "dense" else row["method"]
        lines.append(f"| {mask} | " + " | ".join(f"{row[name]:.2f}" for name in columns) + " |")
    return "\n".join(lines)


def _loading(model: PreTrainedModel, name: str, kind: str) -> str:
    needed = bool(_patterns(model))
    trust = ", trust_remote_code=True" if getattr(model.config, "auto_map", None) else ""
    code = [
        f"from transformers import {kind}, AutoTokenizer",
        *(["", IMPORT] if needed else []),
        "",
        f'model = {kind}.from_pretrained("{name}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
    ]
    if _layers(model, MaskedLinear):
        code += [
            "",
            "from maskpro_kernels import finalize",
            "",
            "finalize(model)  # to bake the masks in; without it the model can go on learning",
        ]
    return "## How to load it\n\n```python\n" + "\n".join(code) + "\n```"


def _listed(title: str, values: Mapping) -> str:
    if not values:
        return ""
    rows = (f"| {name} | {_cell(value)} |" for name, value in values.items())
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _cell(value: object) -> str:
    """A value in a table of Markdown."""
    return str(value).replace("|", "\\|").replace("\n", " ")
