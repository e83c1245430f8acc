"""Upload an adapter or a model to the Hugging Face hub: private by default, nothing that is not on a list, no traces of
this machine.

What may go is a list of file names for each kind of directory; everything else stays here and is named. Text files and
the beginnings of binary ones are searched for paths of this machine before anything is sent.
"""

from __future__ import annotations

import getpass
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxlora import files
from mlxlora.adapters import files as adapters
from mlxlora.architecture import refuse_links_out
from mlxlora.errors import ConfigError, InputError, MlxLoraError, Problem
from mlxlora.training.events import Event, Notice
from mlxlora.version import __version__
from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.model_card import Run, Subject, card
from mlxlora_convert.ours import HUB_ID

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LICENCES = ("LICENSE*", "NOTICE*")
# kind: (the file that tells it, what may be sent of it)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "peft": ("adapter_model.safetensors", ("adapter_model.safetensors", "adapter_config.json", *LICENCES)),
    "adapter": ("adapters.safetensors", ("adapters.safetensors", "adapter_config.json", "manifest.json", *LICENCES)),
    "gguf": ("*.gguf", ("*.gguf", "Modelfile", *LICENCES)),
    "model": (
        "model*.safetensors",
        ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER,
         *LICENCES),
    ),
}  # fmt: skip
# a vocabulary may well hold "/home/" as a token
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", "*.gguf")
TEXT = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", "")
SEARCHED = 4 << 20  # bytes of a binary file that are searched; headers and metadata stand first
PATHS = re.compile(rb"(?:/Users/|/home/|/root/|[A-Za-z]:\\+Users\\+)[^\s\"'\\/]*")


@dataclass(frozen=True, slots=True)
class Sent:
    """One file of an upload: its name and size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What was sent, or would be.

    repo:     the repository
    url:      where it is, empty for a dry run
    private:  whether only its owner sees it
    files:    what was sent
    left_out: what lay beside it and was not sent
    card:     the text of README.md
    commit:   the hub's name for this state, empty for a dry run
    """

    repo: str
    url: str
    private: bool
    files: tuple[Sent, ...]
    left_out: tuple[str, ...]
    card: str
    commit: str

    def __str__(self) -> str:
        seen = "private" if self.private else "public"
        lines = [f"{self.url} ({seen})" if self.url else f"{self.repo} ({seen}), not sent: dry run"]
        lines += [f"  {one.name}  {files.human_bytes(one.bytes)}" for one in self.files]
        if self.left_out:
            lines.append(f"not sent: {', '.join(self.left_out)}")
        after = f"mlxlora generate --help, to try {self.repo}" if self.url else "the same command without --dry_run"
        return "\n".join([*lines, "", f"next: {after}"])


def upload(
    source: Path,
    repo: str,
    *,
    private: bool = True,
    base: str = "",
    license: str = "",
    card_file: Path | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> UploadResult:
    """Send a run's adapter, an adapter, a PEFT adapter, a GGUF file or a model to the Hugging Face hub.

    The list of files is told before the first byte is sent. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        source: a run directory (its best adapter is sent), the directory to send, or a GGUF file
        repo: name on the hub: OWNER/NAME; made when it does not exist
        private: only you see it; an existing public repository is refused unless this is false
        base: hub id of the base model, for the card; not given: as far as the files tell
        license: licence identifier for the card, such as apache-2.0
        card_file: a README.md of your own instead of the one that is written from the run
        dry_run: tell what would be sent, and send nothing
        endpoint: another hub than https://huggingface.co

    Raises ConfigError when `repo` or `endpoint` cannot be one, FormatError when weights are damaged, InputError when a
    file names a place or a user of this machine, MlxLoraError when the hub refuses.
    """
    if not HUB_ID.fullmatch(repo) or ".." in repo:
        raise ConfigError(f"--repo '{repo}' must be OWNER/NAME.")
    if endpoint is not None and not re.fullmatch(r"https?://[^\s/?#]+(/\S*)?", endpoint):
        raise ConfigError(f"--endpoint '{endpoint}' must be the address of a hub, such as https://huggingface.co.")
    source = Path(source)
    directory = _directory(source)
    alone = source.is_file()  # what lies beside a file that is named is nobody's business
    kind = "gguf" if alone else _kind(directory)
    chosen, left_out = ([source.name], []) if alone else _chosen(directory, kind)
    if not alone:
        refuse_links_out(directory, chosen)
    run = Run.read(source if source.is_dir() else source.parent)
    text = _card(directory, run, Subject(repo, kind, base, license), card_file)
    with tempfile.TemporaryDirectory(prefix="mlxlora-upload-") as scratch:
        staged = _stage(directory, chosen, text, Path(scratch))
        _refuse_damaged(staged)
        _refuse_traces(staged)
        sent = tuple(Sent(name, path.stat().st_size) for name, path in staged.items())
        if dry_run:
            return UploadResult(repo, "", private, sent, tuple(left_out), text, "")
        _announce(repo, private, sent, left_out, on_event)
        url, commit = _send(repo, staged, private=private, endpoint=endpoint)
    return UploadResult(repo, url, private, sent, tuple(left_out), text, commit)


def _directory(source: Path) -> Path:
    """The directory whose files go: of a run, that of its best adapter; of a GGUF file, where it lies."""
    if not source.exists():
        raise InputError(f"{source} does not exist.")
    if source.is_file():
        if source.suffix != ".gguf":
            raise InputError(f"{source} is a file. Name the directory that holds it, or a GGUF file.")
        return source.parent
    if any(path.match(mark) for path in source.iterdir() for mark, _ in KINDS.values()):
        return source
    return adapters.find(source)


def _kind(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    for kind, (mark, _) in KINDS.items():
        if any(fnmatchcase(name, mark) for name in names):
            return kind
    marks = ", ".join(mark for mark, _ in KINDS.values())
    raise InputError(f"{directory} holds nothing that can be uploaded ({marks}).")


def _chosen(directory: Path, kind: str) -> tuple[list[str], list[str]]:
    """Names that may go, and names that stay."""
    allowed = KINDS[kind][1]
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in directory.iterdir())
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in allowed)]
    return chosen, [name for name in names if name not in chosen and name != "README.md"]


def _card(directory: Path, run: Run, subject: Subject, card_file: Path | None) -> str:
    if card_file is not None:
        return files.read_text(Path(card_file))
    base = subject.base or _known_base(directory, run)
    return card(Subject(subject.repo, subject.what, base, subject.license), run)


def _known_base(directory: Path, run: Run) -> str:
    """The base model's hub id, or else its bare name, as the run, the manifest or PEFT's configuration tell it."""
    told = [str(run.settings.get("model") or "")]
    for name, keys in (("manifest.json", ("base", "name")), ("adapter_config.json", ("base_model_name_or_path",))):
        if (directory / name).is_file():
            value: Any = files.read_json(directory / name)
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            told.append(str(value or ""))
    ids = [one for one in told if HUB_ID.fullmatch(one) and not Path(one).exists()]
    names = [Path(one).name for one in told if one]
    return next(iter([*ids, *names]), "")


def _stage(directory: Path, chosen: list[str], text: str, scratch: Path) -> dict[str, Path]:
    """The files as they go: originals, a config.json without `_name_or_path`, and the card."""
    staged = {name: directory / name for name in chosen}
    if "config.json" in staged:
        config = files.read_json(staged["config.json"])
        if isinstance(config, dict) and not HUB_ID.fullmatch(str(config.get("_name_or_path") or "a/b")):
            del config["_name_or_path"]
            staged["config.json"] = scratch / "config.json"
            staged["config.json"].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    staged["README.md"] = scratch / "README.md"
    staged["README.md"].write_text(text, encoding="utf-8")
    return staged


def _refuse_damaged(staged: dict[str, Path]) -> None:
    """Raise FormatError for weights that no reader could load: cut short, or no such file at all."""
    for name, path in staged.items():
        if name.endswith(".safetensors"):
            files.check_safetensors(path)
        elif name.endswith(".gguf"):
            read_header(path)


def _refuse_traces(staged: dict[str, Path]) -> None:
    """Raise InputError when a file names a home directory or the user of this machine."""
    problems = [
        Problem(name, f"holds '{trace}'", "Take it out, or leave this file away")
        for name, path in staged.items()
        for trace in sorted(set(_traces(path)))[:3]
    ]
    if problems:
        raise InputError.of("These files tell where or by whom they were made. Nothing was sent:", problems)


def _traces(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        content = file.read() if path.suffix in TEXT else file.read(SEARCHED)
    home = f"{Path.home()}/"
    if len(home) > len("/root/") and home.encode() in content:
        yield home
    if any(fnmatchcase(path.name, pattern) for pattern in VOCABULARIES):
        return
    yield from (match.decode("utf-8", "replace") for match in PATHS.findall(content))
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        return
    if f"/{user}/".encode() in content:
        yield f"/{user}/"


def _announce(
    repo: str, private: bool, sent: tuple[Sent, ...], left_out: list[str], tell: Callable[[Event], None] | None
) -> None:
    if tell is None:
        return
    tell(Notice(0, f"sending to {repo} ({'private' if private else 'PUBLIC'}):"))
    for one in sent:
        tell(Notice(0, f"  {one.name}  {files.human_bytes(one.bytes)}"))
    if left_out:
        tell(Notice(0, f"not sending: {', '.join(left_out)}"))


def _send(repo: str, staged: dict[str, Path], *, private: bool, endpoint: str | None) -> tuple[str, str]:
    """One commit with exactly these files; returns the repository's address and the commit's name."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    api = HfApi(endpoint=endpoint, library_name="mlxlora", library_version=__version__)
    disable_progress_bars()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise InputError(
                f"{repo} exists and everybody can read it. Nothing was sent. Say --private false if that is meant."
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in staged.items()]
        commit = api.create_commit(repo, operations, commit_message="Upload with mlxlora")
    except OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it first.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = " Log in with `hf auth login`, with a token that may write." if status in (401, 403) else ""
        raise MlxLoraError(f"The hub refused {repo}: {str(error).splitlines()[0]}.{advice}") from None
    except (OSError, RuntimeError, ValueError) as error:
        advice = " A hub without Xet storage wants HF_HUB_DISABLE_XET=1 in the environment." if endpoint else ""
        raise MlxLoraError(f"{repo} could not be sent: {str(error).splitlines()[0]}.{advice}") from None
    finally:
        enable_progress_bars()
    return f"{api.endpoint}/{repo}", str(commit.oid)
