"""Saving models with their tokenizers and model cards, here and on the hub."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import convert_file_size_to_int

from ..files import disk_errors, open_to_others
from .model_card import CARD, Origin, is_own, write_card
from .stored_layers import prepare_for_saving

# What ``push_to_hub=True`` of ``save_pretrained`` takes beside it
PUSH_OPTIONS = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description")
SAVE_OPTIONS = {
    name
    for name, parameter in inspect.signature(PreTrainedModel.save_pretrained).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in ("self", "save_directory", "push_to_hub")
}


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    origin: Origin | None = None,
    push_to_hub: bool = False,
    **options,
) -> None:
    """Writes a checkpoint (config, safetensors weights, tokenizer, model card) that ``from_pretrained(folder)`` loads.

    Packed weights and logits are written as such, with the ``quantization_config`` by which they are loaded. A
    README.md that is there and that this function has not written is kept, here and on the hub, and a warning tells so.

    Args:
        model, tokenizer: to save.
        folder: made if missing.
        origin: what the model card tells beside what it finds in the model.
        push_to_hub: whether to upload what was written, in one commit.
        options: as ``save_pretrained`` of the model takes them, such as ``max_shard_size="5GB"``; with ``push_to_hub``
            also ``repo_id`` (default: the folder's name), ``private``, ``token``, ``revision``, ``create_pr``,
            ``commit_message`` and ``commit_description``.

    Raises:
        TypeError: if an option is none of these.
        ValueError: if the model has both masked and packed layers, or shards of layers, or adapters of peft beside
            them, or an option is out of its range.
        OSError: if a file cannot be written, or the hub does not take it. What was written then stays.
    """
    folder, origin = Path(folder), Origin() if origin is None else origin
    push = _push_options(folder, push_to_hub, options)
    prepare_for_saving(model)
    before = _written(folder)
    with disk_errors(folder):
        model.save_pretrained(folder, **options)
    if not options.get("is_main_process", True):
        return
    for path in folder.glob("*.safetensors"):
        open_to_others(path)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises no other for a full disk
        if type(error) is Exception:
            raise OSError(f"{folder}: {error}") from error
        raise
    write_card(model, folder, push["repo_id"] if push else folder.resolve().name, origin)
    if push:
        files = {name for name, time in _written(folder).items() if before.get(name) != time}
        _push(folder, files, **push)


def _push_options(folder: Path, push_to_hub: bool, options: dict) -> dict:
    """Those of the hub, taken out of the options, all of which are checked; none where nothing is pushed."""
    if not isinstance(push_to_hub, bool):
        raise TypeError(f"push_to_hub: expected a bool, got {push_to_hub!r}; name the repository by repo_id")
    known = SAVE_OPTIONS | set(PUSH_OPTIONS)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"options: expected those of save_pretrained, {', '.join(sorted(known))}, got {unknown}")
    if "max_shard_size" in options:
        check_shard_size(options["max_shard_size"])
    # what save_pretrained would take for its own upload
    push = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
    if not push_to_hub:
        if push:
            raise ValueError(f"push_to_hub: expected True beside {', '.join(push)}, got False")
        return {}
    push.setdefault("repo_id", folder.resolve().name)
    check_repo_id(push["repo_id"])
    return push


def check_shard_size(size: int | str) -> None:
    """Raise ValueError unless it is a number of bytes, or one with a unit such as "5GB"."""
    try:
        sound = not isinstance(size, bool) and convert_file_size_to_int(size) > 0
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f'max_shard_size: expected bytes, or a whole number with its unit, such as "5GB", got {size!r}'
        )


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a repository on the hub may have that name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected a name such as owner/name, got {repo_id!r}: {error}") from error


def check_login(token: str | bool | None = None) -> None:
    """Raise ValueError unless the hub knows who is pushing, OSError if it cannot be reached."""
    try:
        HfApi().whoami(token)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        told = f"token: expected one that the hub takes, got none: {_first(error)}; run `hf auth login`"
        raise ValueError(told) from error
    except Exception as error:
        raise OSError(f"the hub cannot be reached: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _written(folder: Path) -> dict[str, int]:
    """When each file was written, by its path in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> bool:
    """Whether a repository has a card that someone else has written or changed, which is told by a warning."""
    if not api.file_exists(repo_id, CARD, revision=revision):
        return False
    there = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8", errors="replace")
    if is_own(there) or there == (folder / CARD).read_text(encoding="utf-8", errors="replace"):
        return False
    warnings.warn(f"{CARD} of {repo_id} is kept, since someone else has written or changed it", stacklevel=4)
    return True


def _push(folder: Path, files: set[str], repo_id: str, private: bool | None = None, token=None, **commit) -> None:
    """Upload files of a folder in one commit, but for a README.md where the repository has one of its own."""
    api = HfApi(token=token)
    try:
        repo_id, revision = api.create_repo(repo_id, private=private, exist_ok=True).repo_id, commit.get("revision")
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # a card that was kept here goes along
        files = files - {CARD} if _has_card_of_its_own(api, repo_id, revision, folder) else files | {CARD}
        commit.setdefault("commit_message", "Upload model")
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=sorted(files), **commit)
    except Exception as error:
        raise OSError(
            f"the model is in {str(folder)!r}, but could not be pushed to {repo_id}: {_first(error)}; push it by "
            f"`hf upload {repo_id} {folder}`"
        ) from error
