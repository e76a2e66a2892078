"""Files of a run: written whole or not at all; TOML; what is missing on this machine."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import tomllib
from typing import Any, BinaryIO, ContextManager, Iterable, Mapping, Sequence

from ..data.errors import written_whole

__all__ = ["RunError", "atomic", "need", "read_toml", "write_csv", "write_json", "write_toml"]


class RunError(ValueError):
    """Something that the user can mend, in one clear sentence: a file, an option, a device, a missing package."""


def atomic(path: str | os.PathLike) -> ContextManager[BinaryIO]:
    """A binary file that takes the name `path` in one step when the block ends well; RunError where it cannot be written."""
    return written_whole(path, RunError)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def write_toml(path: str | os.PathLike, values: Mapping[str, Any], comment: str = "") -> None:
    """Flat values: strings, numbers, booleans, lists, mappings; None is written as "none"."""
    lines = [f"# {line}" for line in comment.splitlines()] + [f"{name} = {_toml(value)}" for name, value in values.items()]
    with atomic(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid TOML: {error}") from None


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return json.dumps(value)


_PACKAGES = {"sklearn": "scikit-learn", "torch.utils.tensorboard": "tensorboard"}


def need(module: str, purpose: str) -> Any:
    """Imports an optional module, or raises RunError saying what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = _PACKAGES.get(module, _PACKAGES.get(module.split(".")[0], module.split(".")[0]))
        raise RunError(f'{purpose} needs {package}, which is not installed: pip install "ada2i_fast[train]"') from None
