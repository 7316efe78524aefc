"""Reads the files of a saved model: JSON, the headers and the index of weights; finds damage."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOWNLOAD_AGAIN = "download it again"
"""What to do about a damaged file."""
_LFS_POINTER = b"version https://git-lfs"


def folder_or_file(name: str, path: Path, others: str) -> tuple[bool, bool]:
    """Whether the name of a model is that of a folder, and whether it is that of a file.

    Args:
        name: The name as given.
        path: The path that it stands for.
        others: What else than a folder the error names.

    Raises:
        ValueError: The path cannot be read.
    """
    try:
        # An empty name would be the current folder.
        return name != "" and path.is_dir(), path.is_file()
    except OSError as error:
        raise ValueError(
            f"cannot read the model {name!r}: {error.strerror}; give a readable folder{others}."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read, or holds something else.
    """
    check_content(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of UTF-8
        raise ValueError(f"{file} is not valid JSON ({error}); {DOWNLOAD_AGAIN}.") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, got {type(content).__name__}; {DOWNLOAD_AGAIN}."
        )
    return content


def read_shapes(file: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file, from its header.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read, or is not as long as its header says.
    """
    from safetensors import SafetensorError, safe_open

    check_content(file)
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or truncated at {file.stat().st_size:,} bytes "
            f"({str(error).rpartition(': ')[2]}); {DOWNLOAD_AGAIN}."
        ) from None


def weight_files(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """The files of a part's weights, and the tensors that the index lists for each.

    Raises:
        ValueError: There are no weights, or their index is invalid.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_index(index)
        if (folder / name).exists():
            return {folder / name: []}
    found = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
    raise ValueError(
        f"{folder} has no weights, {' or '.join(names)}: found {found}; {DOWNLOAD_AGAIN}."
    )


def unreadable(file: Path, error: OSError) -> ValueError:
    """The error to raise if a file of a model cannot be read."""
    return ValueError(
        f"cannot read {str(file)!r}: {error.strerror}; make it readable, or give another model."
    )


def check_content(file: Path) -> None:
    """Raise ValueError if a file is empty or only a git-LFS pointer."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(file, error) from None
    if not start:
        raise ValueError(f"{file} is empty; {DOWNLOAD_AGAIN}.")
    if start == _LFS_POINTER:
        raise ValueError(
            f"{file} is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder."
        )


def check_weights(file: Path, promised: list[str]) -> dict[str, list[int]]:
    """The shapes in a file of weights, which must hold the promised tensors.

    Pickled weights have no header; their shapes are not read.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or lacks a tensor.
    """
    if file.suffix != ".safetensors":
        _check_pickled(file)
        return {}
    shapes = read_shapes(file)
    missing = [name for name in promised if name not in shapes]
    if missing:
        raise ValueError(
            f"{file} lacks {len(missing)} of the tensors that its index names, such as "
            f"{missing[0]!r}; {DOWNLOAD_AGAIN}."
        )
    return shapes


def _check_pickled(file: Path) -> None:
    """Raise ValueError if a file is no archive or pickle as torch.save writes them."""
    check_content(file)
    with file.open("rb") as stream:
        start = stream.read(1)
    # An archive ends with its list of contents, and only older files are plain pickles.
    if not (zipfile.is_zipfile(file) or start == b"\x80"):
        raise ValueError(
            f"{file} is damaged or truncated at {file.stat().st_size:,} bytes; {DOWNLOAD_AGAIN}."
        )


def _read_index(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensors to files; {DOWNLOAD_AGAIN}.")
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(index.parent / str(name), []).append(tensor)
    return files
