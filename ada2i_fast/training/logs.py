"""What a run leaves for the eye: CSV per epoch, TensorBoard, tables."""

from __future__ import annotations

import math
import os
import statistics
from typing import Any, Callable, Mapping, Sequence

from .files import need, RunError, write_csv, write_json

__all__ = ["Board", "epoch_columns", "results", "results_table", "write_results"]


def epoch_columns(modalities: Sequence[str]) -> list[str]:
    """Columns of epochs.csv. Losses are sums over batches, ratio and coefficient means over them; scores are of the dev split."""
    return ["epoch", "train_loss", "feature_loss", "dev_loss", "dev_weighted_f1", "dev_accuracy", "lr", "seconds", "dev_seconds",
            *(f"{what}_{m}" for what in ("ratio", "coefficient", "dev_weighted_f1", "dev_accuracy") for m in modalities)]


class Board:
    """TensorBoard curves of one seed, or nothing where TensorBoard is not installed."""

    def __init__(self, directory: str | os.PathLike | None, first_epoch: int, say: Callable[[str], None]) -> None:
        self.writer = None
        if directory is None:
            return
        try:
            self.writer = need("torch.utils.tensorboard", "TensorBoard logging").SummaryWriter(os.fspath(directory), purge_step=first_epoch)
        except RunError as error:
            say(f"note: {error}")

    def add(self, row: Mapping[str, float], modalities: Sequence[str]) -> None:
        if self.writer is None:
            return
        groups = {"train_loss": "loss/train", "feature_loss": "loss/feature", "dev_loss": "loss/dev", "lr": "optimizer/lr",
                  "dev_weighted_f1": "dev/weighted_f1", "dev_accuracy": "dev/accuracy"}
        for m in modalities:
            groups |= {f"ratio_{m}": f"ratio/{m}", f"coefficient_{m}": f"coefficient/{m}",
                       f"dev_weighted_f1_{m}": f"unimodal_weighted_f1/{m}", f"dev_accuracy_{m}": f"unimodal_accuracy/{m}"}
        for name, tag in groups.items():
            self.writer.add_scalar(tag, row[name], row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def flat(result: Mapping[str, Any]) -> dict[str, float]:
    """One seed's result as a row of results.csv."""
    test = result["test"]
    row = {"weighted_f1": test["weighted_f1"], "accuracy": test["accuracy"], "macro_f1": test["macro_f1"]}
    row |= {f"f1_{name}": value for name, value in test["f1"].items()}
    for m, found in test["unimodal"].items():
        row |= {f"{m}_weighted_f1": found["weighted_f1"], f"{m}_accuracy": found["accuracy"]}
    return row | {"dev_weighted_f1": result["dev_weighted_f1"], "best_epoch": result["best_epoch"], "epochs": result["epochs"],
                  "seconds": result["seconds"]}


def results(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds (None for a single one)."""
    rows = [flat(result) for result in per_seed]
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    std = {name: statistics.stdev(row[name] for row in rows) if len(rows) > 1 else None for name in rows[0]}
    return {"seeds": [result["seed"] for result in per_seed], "mean": mean, "std": std, "per_seed": list(per_seed)}


def write_results(directory: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """results.csv (a row per seed, then mean and std) and results.json."""
    rows = [{"seed": result["seed"], **flat(result)} for result in found["per_seed"]]
    rows += [{"seed": name, **{k: "" if v is None else v for k, v in found[name].items()}} for name in ("mean", "std")]
    write_csv(os.path.join(directory, "results.csv"), rows, list(rows[0]))
    write_json(os.path.join(directory, "results.json"), found)


def results_table(found: Mapping[str, Any]) -> str:
    """Test scores in per cent: a line per score, a column per seed, mean and standard deviation."""
    rows = [flat(result) for result in found["per_seed"]]
    test = found["per_seed"][0]["test"]
    lines = [("weighted F1", "weighted_f1"), ("accuracy", "accuracy"), *((f"F1 {name}", f"f1_{name}") for name in test["f1"])]
    for m in test["unimodal"]:
        lines += [(f"{m} alone, weighted F1", f"{m}_weighted_f1"), (f"{m} alone, accuracy", f"{m}_accuracy")]
    table = [["test score, %", *(f"seed {seed}" for seed in found["seeds"]), "mean", "std"]]
    for title, name in lines:
        std = found["std"][name]
        table.append([title, *(_percent(row[name]) for row in rows), _percent(found["mean"][name]), "-" if std is None else f"± {_percent(std)}"])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in table]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _percent(value: float) -> str:
    return "nan" if math.isnan(value) else f"{100 * value:.2f}"
