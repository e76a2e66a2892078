"""Checkpoints: one file of tensors and plain values, written atomically and read without executing anything in it.

Two kinds. "model" (best.pt): configuration, corpus description, parameters. "run" (checkpoint.pt): these and all that an
interrupted run needs to go on as if nothing had happened.
"""

from __future__ import annotations

import os
from typing import Any, Mapping

import torch

from ..config import Ada2IConfig
from ..model import Ada2I
from .files import RunError, atomic

__all__ = ["check_corpus", "describe", "load", "model_of", "save"]

FORMAT = "ada2i_fast checkpoint"
VERSION = 1
_KEYS = {"model": ("config", "corpus", "model", "epoch", "dev_weighted_f1"),
         "run": ("config", "corpus", "model", "epoch", "optimizer", "scheduler", "best", "stale", "history", "order", "random",
                 "seconds")}


def describe(corpus, path: str | None = None) -> dict[str, Any]:
    """What a checkpoint remembers of its corpus: enough to refuse another one, and where it was."""
    return {"name": corpus.name, "path": path, "class_names": list(corpus.class_names), "widths": dict(corpus.widths),
            "conversations": corpus.num_conversations, "utterances": corpus.num_utterances}


def save(path: str | os.PathLike, kind: str, config: Ada2IConfig, corpus: Mapping[str, Any], **state: Any) -> None:
    """Writes a checkpoint of `kind` "model" or "run". Raises RunError where it cannot be written."""
    values = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config.to_dict(), "corpus": dict(corpus), **state}
    missing = [key for key in _KEYS[kind] if key not in values]
    if missing:
        raise TypeError(f"a {kind} checkpoint lacks {', '.join(missing)}")
    with atomic(path) as file:
        torch.save(values, file)


def load(path: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Raises RunError for a missing, foreign, truncated or newer file, or another kind."""
    path = os.fspath(path)
    try:
        file = open(path, "rb")
        head = file.read(4)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        if head != b"PK\x03\x04":
            raise RunError(f"{path} is not a checkpoint of ada2i_fast")
        file.seek(0)
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:                             # torch.load has no error of its own: whatever the bytes provoke
            raise RunError(f"{path} is truncated, or not a checkpoint of ada2i_fast ({_first_line(error)})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise RunError(f"{path} is not a checkpoint of ada2i_fast")
    if values.get("version") != VERSION:
        raise RunError(f"{path} has checkpoint version {values.get('version')}, this package reads version {VERSION}")
    if values.get("kind") not in _KEYS or any(key not in values for key in _KEYS[values["kind"]]):
        raise RunError(f"{path} is damaged: a part of it is missing")
    if kind is not None and values["kind"] != kind:
        raise RunError(f"{path} is a checkpoint of a {values['kind']}, expected one of a {kind}")
    return values


def model_of(values: Mapping[str, Any], path: str, backend: str = "auto") -> Ada2I:
    """The model of a loaded checkpoint, with its parameters (the best ones so far of a run's)."""
    try:
        model = Ada2I(Ada2IConfig.from_dict(values["config"]), backend=backend)
        model.load_state_dict(values["best"]["model"] if values["kind"] == "run" else values["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"{path} does not fit this package: {_first_line(error)}") from None
    return model.eval()


def check_corpus(values: Mapping[str, Any], corpus, path: str, labels: bool) -> None:
    """Refuses a corpus of other modalities, widths or (where `labels` matter) classes than the checkpoint's."""
    widths = values["config"]["input_widths"]
    for m in values["config"]["modalities"]:
        if m not in corpus.widths:
            raise RunError(f"{path} was trained with modality {m!r}, corpus {corpus.name} has {', '.join(corpus.modalities)}")
        if corpus.widths[m] != widths[m]:
            raise RunError(f"{path} was trained with {widths[m]} features of modality {m!r}, corpus {corpus.name} has {corpus.widths[m]}")
    if labels and list(corpus.class_names) != values["corpus"]["class_names"]:
        raise RunError(f"{path} was trained with classes {', '.join(values['corpus']['class_names'])}; "
                       f"corpus {corpus.name} has {', '.join(corpus.class_names) or 'none'}")


def check_config(values: Mapping[str, Any], config: Ada2IConfig, path: str) -> None:
    """Refuses a checkpoint of another configuration, naming the first option that differs."""
    for name, here in config.to_dict().items():
        there = values["config"].get(name)
        if there != here:
            raise RunError(f"{path} is of another configuration: {name} is {there!r} there and {here!r} here")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")[:200]
