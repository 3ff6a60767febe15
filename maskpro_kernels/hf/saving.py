"""Save models with their tokenizers and model cards, in a folder and on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import make_readable
from ..modules import MaskedLinear
from ..ops.pattern import NMPattern
from ..packed import KEEP, REPLACING, SPARSE, Int8Linear, NMLinear, bits_a_weight
from ..shards import is_distributed
from ..unfuse import adapter_modules
from .loading import SMOLLM2_ID, SMOLLM2_LICENSE
from .quantizer import describe, guarded_state_dict

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}
{% if needs_import %}
**Import `maskpro_kernels.hf` before you load this model**, as below. transformers alone \
{{ "does not load it." if is_packed else "loads its dense weights, without the masks." }}
{% endif %}
This is {{ base }} with {{ patterns or "dense weights" }}{% if patterns %} sparsity: \
{% set n, m = ("N", "M") if " " in patterns else patterns.split(":") %}of every {{ m }} consecutive weights \
along a layer's input, {{ n }} {{ "is" if n == "1" else "are" }} kept, and the others are zero{% endif %}. {{ stored }}
{% if left_dense %}
These linear layers are dense: {{ left_dense }}.
{% endif %}
{%- if rows %}
| {{ columns | join(" | ") }} |
|---|{{ "---:|" * (columns | length - 1) }}
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
Perplexities of held-out text; lower is better.
{% endif %}
```python
from transformers import {{ kind }}, AutoTokenizer
{%- if needs_import %}

import maskpro_kernels.hf
{%- endif %}

model = {{ kind }}.from_pretrained("{{ name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
```

Made with `maskpro_kernels`, the kernels of MaskPro, [arXiv 2506.12876](https://arxiv.org/abs/2506.12876).
"""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *,
               base_model: str | None = None, pattern: str | None = None,
               table: Sequence[Mapping[str, object]] = (), max_shard_size: int | str = "50GB",
               push_to_hub: str | None = None, private: bool | None = None) -> None:  # fmt: skip
    """Write a checkpoint (config, safetensors weights, tokenizer, model card) that ``from_pretrained(folder)`` loads.

    Packed weights and logits stay so, and ``quantization_config`` describes them. An existing README.md is kept instead
    of the model card.

    Args:
        model, tokenizer: to save.
        folder: made if missing.
        base_model: for the card, id on the hub or another name of the dense model.
        pattern: for the card, "N:M" of the zeros in a dense checkpoint; masked and packed layers have their own.
        table: for the card, rows of a table of perplexities, such as {"mask": "dense", "perplexity": 15.2}, all with
            the same columns.
        max_shard_size: largest file of weights, in bytes or a text such as "5GB".
        push_to_hub: id of a repository, made if missing, to upload the folder to; None: no upload.
        private: whether a new repository is private.

    Raises:
        ValueError: if the model has shards of layers, or adapters of peft beside sparse layers, or an option is out of
            its range.
        OSError: if a file cannot be written, or the upload fails. Files that were written stay.
    """
    folder = Path(folder)
    shard = next((name for name, parameter in model.named_parameters() if is_distributed(parameter)), None)
    if shard is not None:
        raise ValueError(f"model: expected whole tensors, got a DTensor in {shard}")
    sparse = {name: layer for name, layer in model.named_modules() if isinstance(layer, REPLACING)}
    adapters = adapter_modules(model)
    if sparse and adapters:
        raise ValueError(
            "model: expected one without adapters of peft beside its masked or packed layers, got one with "
            f"{min(adapters)}; save the adapter by save_pretrained of the PeftModel, and the model of its unload()"
        )
    for name, layer in sparse.items():
        if isinstance(layer, MaskedLinear) and layer.is_shard:
            raise ValueError(f"model: expected whole layers, got a shard in {name}")
    describe(model)
    try:
        model.save_pretrained(folder, state_dict=guarded_state_dict(model), max_shard_size=max_shard_size)
        for file in folder.glob("*.safetensors"):
            make_readable(file)
        tokenizer.save_pretrained(folder)
        if not (folder / "README.md").exists():
            name = push_to_hub or folder.resolve().name
            model_card(model, name, base_model=base_model, pattern=pattern, table=table).save(folder / "README.md")
    except Exception as error:
        # on a full disk tokenizers raises a bare Exception
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{folder}: {error}") from error
        raise
    if push_to_hub is None:
        return
    try:
        HfApi().create_repo(push_to_hub, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to_hub, folder_path=folder, commit_message="Upload model")
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"push_to_hub: the model is in {str(folder)!r}, but could not be pushed to {push_to_hub}: {reason}; "
            f"push it by `hf upload {push_to_hub} {folder}`"
        ) from error


def model_card(model: PreTrainedModel, name: str, *, base_model: str | None = None,
               pattern: str | None = None, table: Sequence[Mapping[str, object]] = ()) -> ModelCard:  # fmt: skip
    """Write the model card for a model that loads by ``name``; other arguments as for ``save_model``."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SPARSE)}
    patterns = sorted({str(layer.pattern) for layer in layers.values()}) or ([pattern] if pattern else [])
    packed = [layer for layer in layers.values() if isinstance(layer, NMLinear)]
    stored = "The checkpoint is dense: zeros are stored like other values."
    if packed:
        kinds = " and ".join(sorted({layer.kind for layer in packed} - {KEEP}))
        stored = f"{len(packed)} layers are packed: kept values{kinds and f' rounded to {kinds}'} and a bitmask, "
        stored += f"{bits_a_weight(packed):.2f} bits a weight instead of {8 * packed[0].packed.dtype.itemsize}."
    elif layers:
        stored = f"The checkpoint has whole weights, and logits of the masks of {len(layers)} layers."
    in_int8 = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    if in_int8:
        names = ", ".join(f"`{name}`" for name in in_int8)
        stored += f" Rounded to int8, with all weights: {names}."
    # in a dense checkpoint zeros show which layers have a mask
    linears = {name: layer.weight for name, layer in model.named_modules() if type(layer).__name__ == "Linear"}
    if not layers:
        density = NMPattern(pattern).n / NMPattern(pattern).m if pattern else 1.0
        linears = {name: w for name, w in linears.items() if not w.is_meta and w.count_nonzero() > density * w.numel()}
    on_hub = base_model is not None and base_model.count("/") == 1
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model if on_hub else None,
            **_license_of(model.name_or_path, base_model if on_hub else None),
            library_name="transformers",
            pipeline_tag="text-generation" if model.can_generate() else None,
            tags=["maskpro", "sparse", "semi-structured-sparsity", *patterns],
        ),
        template_str=TEMPLATE,
        name=name,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else base_model or "a dense model",
        patterns=" and ".join(patterns),
        stored=stored,
        left_dense=", ".join(f"`{name}`" for name in linears),
        columns=list(table[0]) if table else [],
        rows=[[f"{value:.2f}" if isinstance(value, float) else value for value in row.values()] for row in table],
        kind="AutoModelForCausalLM" if model.can_generate() else type(model).__name__,
        needs_import=bool(layers or in_int8),
        is_packed=bool(packed or in_int8),
    )


def _license_of(path: str, base_model: str | None) -> dict[str, str]:
    """License in the card of the base model's folder, or of its id on the hub; empty if there is none."""
    if base_model == SMOLLM2_ID:
        return {"license": SMOLLM2_LICENSE}
    card = Path(path) / "README.md"
    data = None
    # a card may be no YAML, and the hub may not answer
    with suppress(Exception):
        if path and card.is_file():
            data = ModelCard.load(card).data
        elif base_model is not None:
            data = HfApi().model_info(base_model, timeout=10).card_data
    fields = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if value}
