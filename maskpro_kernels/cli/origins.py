"""What the model cards of checkpoints tell of where they come from. Paths of this machine are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..report import FROZEN
from ..text.batches import parse_sources, texts_of
from ..text.sources import is_path
from .models import hub_id
from .progress import tell
from .run_files import REPORT, SETTINGS, read_own
from .start_mask import name_of_init

if TYPE_CHECKING:
    from ..hf import Origin

# Of the machine that learned, or told elsewhere in the card
NOT_TOLD = ("model", "output", "device", "device_map", "logits_device", "report_to")


def origin_of_run(settings: Mapping, weights: str, table: Sequence[Mapping], versions: Mapping[str, str]) -> Origin:
    """Of what a run has learned.

    Args:
        settings: as stored.
        weights: what became of them, see ``told_weights``.
        table: of perplexities.
        versions: of the packages.
    """
    from ..hf import MASK_ALONE, Origin

    changed = MASK_ALONE
    if weights != FROZEN:
        changed = (
            f"Mask and weights: the weights are not those of the base model ({weights}). The mask alone, on the base "
            "model's weights, is another model."
        )
    told = {name: value for name, value in settings.items() if name not in NOT_TOLD and value is not None}
    told |= {name: _without_folders(told[name]) for name in ("data", "other_data") if name in told}
    if "init" in told:
        told["init"] = name_of_init(told["init"])
    return Origin(
        **_base(settings["model"]),
        pattern=settings["pattern"],
        changed=changed,
        table=table,
        texts=(_test_texts(settings), told.get("other_data", "another text")),
        settings=told,
        versions=versions,
    )


def origin_of_export(run: Path, metadata: Mapping[str, str], dtype: str) -> Origin:
    """Of the checkpoint that is written from the logits of a run.

    Args:
        run: its folder; a run that has not ended has no report, and its table no learned mask.
        metadata: of its logits.
        dtype: of the checkpoint.
    """
    settings: Mapping = {"model": metadata["model"], "pattern": metadata["pattern"], "dtype": metadata["dtype"]}
    table, versions = [], {}
    for name in (REPORT, SETTINGS):
        try:
            found = read_own(run / name)
            settings, table, versions = found["settings"] | settings, found["table"], found.get("versions", {})
            break
        except (OSError, ValueError, KeyError, TypeError):
            # an export goes by the logits alone
            continue
    origin = origin_of_run(settings, metadata["weights_are"], table, versions)
    if dtype != metadata["dtype"]:
        stored = f"It is stored in {dtype}; what follows was found in {metadata['dtype']}."
        origin = replace(origin, changed=f"{origin.changed} {stored}")
    return origin


def origin_of_mask_file(provenance: Mapping, model: str, pattern: str) -> Origin:
    """Of a model under the masks of a file: what that tells, or else no more than the base model.

    Args:
        provenance: of the file.
        model: the base.
        pattern: of the masks.
    """
    from ..hf import MASK_ALONE, Origin

    if "origin" in provenance:
        try:
            origin = Origin(**provenance["origin"])
            sound = [isinstance(row["method"], str) and row["perplexity"] > 0 for row in origin.table]
            if all(sound) and isinstance(origin.settings, Mapping) and isinstance(origin.versions, Mapping):
                return origin
        except (KeyError, TypeError):
            pass
        tell("what the mask file tells of its run is left out of the model card: another program wrote it")
    return Origin(**_base(model), pattern=pattern, changed=MASK_ALONE)


def base_name(model: str) -> str:
    """The name of a base model, without the folders of this machine."""
    return _base(model)["base_model"]


def origin_of_masks(model: str, pattern: str, source: str) -> Origin:
    """Of a model under masks that another program has learned."""
    from ..hf import MASK_ALONE, Origin

    return Origin(**_base(model), pattern=pattern, changed=f"{MASK_ALONE} The masks are those of `{_name(source)}`.")


def origin_of_checkpoint(source: str, folder: Path, pattern: str, was_int8: bool, is_int8: bool) -> Origin:
    """Of a checkpoint that holds zeros: what its card or its report tells, else that it is where it was.

    Args:
        source: where it was, as the user named it.
        folder: with its files.
        pattern: of its zeros, or patterns.
        was_int8, is_int8: whether its values were rounded to int8 there, and are stored so now.
    """
    from ..hf import Origin

    known = _reported(folder)
    of = "that checkpoint" if known is None else f"the checkpoint `{_name(source)}`"
    told = f"Zeros and weights are those of {of}"
    if was_int8:
        told += ", which held values that were rounded to int8."
    else:
        told += ", whose values were then rounded to int8." if is_int8 else "."
    if known is None:
        return Origin(**_base(source), pattern=pattern, changed=told, rounded=was_int8)
    changed = f"{known.changed}\n\n{told}" if known.changed else told
    return replace(known, pattern=pattern, changed=changed, rounded=known.rounded or was_int8)


def _reported(run: Path) -> Origin | None:
    """Of the checkpoint in the folder of a run."""
    try:
        found = read_own(run / REPORT)
        return origin_of_run(found["settings"], found["weights"], found["table"], found["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _base(model: str) -> dict:
    """The name of a base model, and whether the hub has it."""
    found = hub_id(model)
    return {"base_model": _name(model) if found is None else found, "on_hub": found is not None}


def _name(source: str) -> str:
    return Path(source).name if source.startswith("/") or is_path(source) else source


def _test_texts(settings: Mapping) -> str:
    """Of what text a run's perplexities are."""
    if "data" not in settings:
        return "test text"
    return ", ".join(_name(name) for name, _ in texts_of(settings["data"])) or "samples of the model"


def _without_folders(data: str) -> str:
    """A list of sources whose files are named without their folders."""
    sources = parse_sources(data)
    if len(sources) == 1:
        return _name(sources[0].name)
    return ",".join(f"{_name(name)}:{float(share):g}" for name, share in sources)
