"""Small configurations, padded batches and the golden cases of the released implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ada2i_fast import Ada2IConfig, DialogueBatch

GOLDEN = Path(__file__).parent / "data" / "golden"
WIDTHS = {"a": 10, "t": 12, "v": 15}


def small_config(preset: str, **changes) -> Ada2IConfig:
    """A model small enough for float64 comparisons, with a preset's semantics and no dropout."""
    return Ada2IConfig.preset(preset, "iemocap", **{**dict(
        input_widths=WIDTHS, hidden_dim=14, tensor_rank=5, feedforward_dim=32, dropout=0.0, alpha=0.37, beta=0.12), **changes})


def padded_case(lengths, widths=WIDTHS, classes=6, seed=0, dtype=torch.float64):
    """Padded inputs {m: [B, T, d]} with zeros beyond each length, lengths [B], flat labels [N]."""
    g = torch.Generator().manual_seed(seed)
    steps = max(lengths)
    tensors = {m: torch.randn(len(lengths), steps, d, generator=g, dtype=dtype) for m, d in widths.items()}
    for b, n in enumerate(lengths):
        for x in tensors.values():
            x[b, n:] = 0
    labels = torch.randint(0, classes, (sum(lengths),), generator=g)
    return tensors, torch.tensor(lengths), labels


def spread_parameters(model: torch.nn.Module, seed: int = 0) -> None:
    """Parameters large enough that AFW's high degree does not hide an error below rounding."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            v = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
            norm = name.endswith(("norm1.weight", "norm2.weight"))
            p.copy_(1 + 0.1 * v if norm else v / (2 * p.shape[1]) ** 0.5 if p.dim() == 2 else 0.1 * v)


class GoldenCase:
    """One case of the released implementation: settings, drawn parameters and inputs, expected figures."""

    def __init__(self, name: str) -> None:
        text = json.loads((GOLDEN / f"{name}.json").read_text())
        self.name, self.case, self.expected = name, text["case"], text["expected"]
        case = self.case
        rs = np.random.RandomState(case["seed"])
        self.parameters = {}
        for key, shape in text["parameters"]:
            v = rs.standard_normal(shape)
            if key.endswith(("norm1.weight", "norm2.weight")):
                v = 1 + 0.1 * v
            else:
                v = v / np.sqrt(2 * shape[1]) if len(shape) == 2 else 0.1 * v
            self.parameters[key] = torch.from_numpy(np.asarray(v))
        rs = np.random.RandomState(case["seed"] + 1)
        lengths = case["lengths"]
        self.tensors = {m: torch.zeros(len(lengths), max(lengths), case["embedding_dim"][m], dtype=torch.float64) for m in "atv"}
        for m in "atv":
            for b, n in enumerate(lengths):
                self.tensors[m][b, :n] = torch.from_numpy(rs.standard_normal((n, case["embedding_dim"][m])))
        self.lengths = torch.tensor(lengths)
        self.labels = torch.from_numpy(rs.randint(0, case["num_classes"], sum(lengths)))
        self.batch = DialogueBatch.from_padded(self.tensors, self.lengths, self.labels)
        self.config = Ada2IConfig.released(
            "iemocap", modalities=case["modalities"], input_widths=case["embedding_dim"], num_classes=case["num_classes"],
            hidden_dim=case["hidden_dim"], tensor_rank=case["tensor_rank"], encoder=case["encoder"],
            encoder_layers=case["encoder_nlayers"], afw=not case.get("no_mmt", False), afw_layers=case["mmt_nlayers"],
            amw=case["mmcosine"], beta=case["beta"], alpha=case["alpha"], dropout=0.0, noise="none")


def assert_summary(actual: torch.Tensor, expected: dict | list, relative: float, what: str) -> None:
    """`actual` against golden figures: all elements, or a summary.

    `relative` to the tensor's root mean square, or to its norm for the sums.

    `probe` and `sum` add n terms, so the error of n independent roundings is relative to l2 * sqrt(n) at the worst.
    """
    if isinstance(expected, list):
        expected = torch.tensor(expected, dtype=torch.float64)
        assert actual.shape == expected.shape, what
        worst = (actual - expected).abs().max().item()
        assert worst <= relative * expected.square().mean().sqrt().item(), f"{what}: {worst}"
        return
    assert list(actual.shape) == expected["shape"], what
    flat = actual.detach().double().flatten()
    n, l2 = max(flat.numel(), 1), expected["l2"]
    floor = 1e-300
    assert abs(flat.norm().item() - l2) <= relative * l2 + floor, f"{what}: l2"
    i = torch.arange(n, dtype=torch.float64)
    assert abs(flat.sum().item() - expected["sum"]) <= relative * l2 * n ** 0.5 + floor, f"{what}: sum"
    assert abs((flat * torch.cos(0.7 * i + 0.3)).sum().item() - expected["probe"]) <= relative * l2 * n ** 0.5 + floor, f"{what}: probe"
    head = torch.tensor(expected["head"], dtype=torch.float64)
    worst = (flat[: head.numel()] - head).abs().max().item()
    assert worst <= relative * max(l2 / n ** 0.5, head.abs().max().item()) + floor, f"{what}: head {worst}"
