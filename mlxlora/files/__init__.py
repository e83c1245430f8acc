"""Files that appear whole or not at all, and files that are read with care.

publish.py  scratch, flush, rename: nothing that mlxlora publishes is ever half there
places.py   where something is to be written, looked at before the work begins
reading.py  JSON, YAML, hashes
manifest.py whether files are still those that a manifest lists
tensors.py  safetensors: the header is checked before MLX maps a byte
archive.py  ZIP: members stay below their folder, and do not grow without bound
space.py    room on the disk, before and while writing
plain.py    values as JSON and YAML know them
"""

from mlxlora.files.archive import zip_members
from mlxlora.files.manifest import MANIFEST, file_records, wrong_files
from mlxlora.files.places import refusal_of, refuse_no_directory, refuse_no_page, refuse_unmakeable
from mlxlora.files.plain import plain
from mlxlora.files.publish import (
    SCRATCH,
    new_directory,
    new_file,
    refuse_existing,
    remove_directory,
    scratch_directory,
    sweep_scratch,
    sync,
    sync_tree,
    write_json,
    write_whole,
)
from mlxlora.files.reading import parse_json, read_json, read_text, read_yaml, sha256
from mlxlora.files.space import free_space, human_bytes, require_space
from mlxlora.files.tensors import check_safetensors, load_safetensors, save_safetensors

__all__ = [
    "MANIFEST",
    "SCRATCH",
    "check_safetensors",
    "file_records",
    "free_space",
    "human_bytes",
    "load_safetensors",
    "new_directory",
    "new_file",
    "parse_json",
    "plain",
    "read_json",
    "read_text",
    "read_yaml",
    "refusal_of",
    "refuse_existing",
    "refuse_no_directory",
    "refuse_no_page",
    "refuse_unmakeable",
    "remove_directory",
    "require_space",
    "save_safetensors",
    "scratch_directory",
    "sha256",
    "sweep_scratch",
    "sync",
    "sync_tree",
    "write_json",
    "write_whole",
    "wrong_files",
    "zip_members",
]
