"""From what a user types to a model directory on this machine: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from mlxlora.errors import DataError, ModelError, nearest

# what a model needs, and nothing else: no original checkpoints, no ONNX, no images
MODEL_FILES = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl",
    "*.jinja",
)  # fmt: skip
# patterns match across folders; of those, only chat templates are a model's own
ELSEWHERE = tuple(f"*/*.{kind}" for kind in ("json", "safetensors", "py", "model", "tiktoken", "txt", "jsonl", "bin"))
# where a repository holds no safetensors
TORCH_FILES = ("pytorch_model*.bin", "model*.bin")
SECONDS = 10.0  # for the hub to say what a name stands for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def find(source: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a model: `source` itself if it is one, else the hub's copy, fetched where it is not yet here.

    revision: branch, tag or commit on the hub; refused for a local directory
    Only the needed files are fetched; an interrupted download goes on; what is here is not fetched again.
    Raises ModelError, in one line, when there is no such directory and no such name, or no way to the hub.
    """
    if not isinstance(source, (str, Path)):
        raise ModelError(
            f"A model is named here by its directory or its name on the hub, not given as {type(source).__name__}."
        )
    if not str(source).strip():
        raise ModelError("An empty name: there is no such directory.")
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"{source} is a local directory: a revision ({revision}) belongs to a name on the hub.")
        return path
    name = str(source)
    if path.exists():
        raise ModelError(f"{source} is a file; a model is a directory with config.json and weights.")
    looks_local = isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not is_name(name):
        raise ModelError(f"{source}: there is no such directory.{_near(path)}")
    return _fetch(name, revision)


def _near(path: Path) -> str:
    """The directory beside `path` that may have been meant, for the end of a message."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, sorted(one.name for one in path.parent.iterdir() if one.is_dir()))


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name} at revision {revision}" if revision else name
    http_error: type[Exception] = HfHubHTTPError.__mro__[1]  # the root of the HTTP library that huggingface_hub uses
    try:
        try:
            listed = [entry.rfilename for entry in HfApi().model_info(name, revision=revision).siblings or []]
        except (OfflineModeIsEnabled, http_error, ConnectionError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            # no way to the hub: what an earlier run has fetched will do, if it is complete
            kept = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*MODEL_FILES],
                ignore_patterns=[*ELSEWHERE],
                local_files_only=True,
            )
            return Path(kept)
        wanted = list(MODEL_FILES)
        if not any(fnmatch(file, "model*.safetensors") and "/" not in file for file in listed):
            wanted += TORCH_FILES
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=[*ELSEWHERE]))
    except GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and sign in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"The hub has {name}, but no revision '{revision}' of it.") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such directory here, and no such model on the hub (or it is private: `hf auth login`)."
            f"{_near(Path(name))}"
        ) from None
    except HFValidationError:
        raise ModelError(f"{name}: no such directory, and no name that the hub allows.") from None
    except HfHubHTTPError as error:
        raise ModelError(f"{at} could not be fetched: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{at}: no such directory here, and the hub cannot be reached (no network, or offline mode)."
            f"{_near(Path(name))}"
        ) from None
    except (http_error, OSError, RuntimeError, ValueError) as error:  # the last two: from Xet's client
        raise ModelError(
            f"{at} could not be fetched: {_first_line(error)}. Run the same command again: it goes on where it stopped."
        ) from None


def is_name(text: str) -> bool:
    """Whether the hub may have something of this name."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def dataset_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a data set's branch, tag or commit stands at; None where the hub cannot be reached.

    Raises DataError when the hub has no such data set or revision, or does not hand it out.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    http_error: type[Exception] = HfHubHTTPError.__mro__[1]  # the root of the HTTP library that huggingface_hub uses
    try:
        found = HfApi().dataset_info(name, revision=revision, timeout=SECONDS)
        return str(found.sha) if found.sha else None
    except GatedRepoError:
        raise DataError(
            f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name} and sign in with "
            "`hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"The hub has the data set {name}, but no revision '{revision}' of it.") from None
    except RepositoryNotFoundError:
        raise DataError(f"{name}: no such data set on the hub (or it is private: `hf auth login`).") from None
    except (OfflineModeIsEnabled, http_error, OSError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
