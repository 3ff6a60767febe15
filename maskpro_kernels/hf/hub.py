"""What the hub has of an id, as files here; what was fetched before is taken from the cache, also offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

# As MaskLLM's ``eval_llama_ppl.py`` asks for it
MASKLLM_FILE = "mask_compressed.npz"
# Of a checkpoint: no weights in other formats
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# For one answer, where a download would try again and again
SECONDS = 10.0


def why_not_on_hub(repo_id: str) -> str | None:
    """What is said of a model that can neither be found on the hub nor lies in the cache, as the end of a sentence."""
    try:
        if isinstance(try_to_load_from_cache(repo_id, "config.json"), str):
            return None
        HfApi().model_info(repo_id, timeout=SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        return "the hub has none that your login may read; check the name"
    except HfHubHTTPError:
        # of a server in trouble, which may answer the next time
        return None
    except Exception as error:
        return f"the hub cannot be reached ({' '.join(str(error).split())}); check the name and the connection"
    return None


def fetch_masks(repo_id: str) -> Path:
    """The file or folder with the masks of a repository, see ``read_masks``.

    It is MaskLLM's ``mask_compressed.npz``, else the only .npz file, else the .pt file or files.

    Raises:
        ValueError: if the repository holds no such file, or several of which one has to be chosen.
        OSError: if it cannot be reached, or does not exist.
    """
    with _told(repo_id):
        try:
            return Path(hf_hub_download(repo_id, MASKLLM_FILE))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            files = HfApi().list_repo_files(repo_id)
    arrays, tensors = ([name for name in files if name.endswith(kind)] for kind in (".npz", ".pt"))
    if len(arrays) > 1:
        raise ValueError(
            f"expected one .npz file in {repo_id!r}, got {', '.join(arrays)}; give the path of one, which "
            f"`hf download {repo_id} {arrays[0]}` prints"
        )
    if not arrays and not tensors:
        raise ValueError(
            f"expected masks, .npz or .pt files, in {repo_id!r}, got none; without --model it is read whole"
        )
    with _told(repo_id):
        if len(tensors) > 1 and not arrays:
            return Path(snapshot_download(repo_id, allow_patterns=tensors)) / Path(tensors[0]).parent
        return Path(hf_hub_download(repo_id, (arrays or tensors)[0]))


def fetch_checkpoint(repo_id: str, code: bool = False) -> Path:
    """The folder of a repository's checkpoint, with the Python code it brings along where that may be run.

    Raises:
        OSError: if it cannot be reached, or does not exist.
    """
    files = [*CHECKPOINT_FILES, "*.py"] if code else list(CHECKPOINT_FILES)
    with _told(repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=files))


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Errors of the hub, which has a dozen of its own, as OSError in one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"expected an id on the hub that can be reached, got {repo_id!r}: {reason}") from error
