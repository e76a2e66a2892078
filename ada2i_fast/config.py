"""Every option of the method, and the two presets over them.

`released` is what the authors' code computes, `published` what the paper describes. Each difference is one field, so it
can be ablated on its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any, Mapping

__all__ = ["Ada2IConfig"]

_CHOICES = {
    "encoder": ("transformer", "lstm"),
    "padding": ("attended", "masked"),
    "ring_order": ("list", "ring"),
    "feature_target": ("gated", "attention"),
    "feature_reduction": ("mean", "sum"),
    "cosine_norm": ("classes", "features"),
    "head": ("none", "mlp"),
    "score_from": ("linear", "cosine"),
    "noise": ("none", "gradient", "parameter"),
    "clip_order": ("before", "after"),
    "dev_split": ("official", "first_tenth", "random_tenth"),
}

_RANGES = {  # field: (kind, lowest, highest)
    "num_classes": (int, 2, None), "hidden_dim": (int, 1, None), "encoder_layers": (int, 1, None),
    "feedforward_dim": (int, 1, None), "afw_layers": (int, 1, None), "tensor_rank": (int, 1, None),
    "head_expansion": (int, 1, None), "beta": (float, None, None), "dropout": (float, 0.0, 1.0),
    "attention_scale": (float, 0.0, None), "cosine_scale": (float, 0.0, None), "alpha": (float, 0.0, None),
    "learning_rate": (float, 0.0, None), "weight_decay": (float, 0.0, None), "clip_norm": (float, 0.0, None),
    "clip_norm_type": (float, 0.0, None), "batch_size": (int, 1, None), "epochs": (int, 1, None),
    "modulation_start": (int, 1, None), "modulation_end": (int, 1, None), "early_stopping": (int, 1, None),
    "scheduler_factor": (float, 0.0, 1.0), "scheduler_patience": (int, 0, None), "seed": (int, 0, None),
}

# Sizes and rates of the paper's data sets: (widths t/a/v, classes, D, R, lr, alpha, beta, batch, epochs), first as in the
# run script of the released code, then as in the paper where it differs. "corpus" is for data of other widths.
_DATASETS: dict[str, dict[str, Any]] = {
    "iemocap": dict(input_widths={"a": 512, "t": 768, "v": 1024}, num_classes=6, hidden_dim=300, tensor_rank=11,
                    learning_rate=1.7e-4, alpha=0.037, beta=0.012, batch_size=10, epochs=50),
    "iemocap4": dict(input_widths={"a": 512, "t": 768, "v": 1024}, num_classes=4, hidden_dim=300, tensor_rank=11,
                     learning_rate=1.7e-4, alpha=0.037, beta=0.012, batch_size=10, epochs=50),
    "meld": dict(input_widths={"a": 300, "t": 768, "v": 342}, num_classes=7, hidden_dim=200, tensor_rank=6,
                 learning_rate=1.3e-4, alpha=0.42, beta=0.55, batch_size=10, epochs=50),
    "mosei2": dict(input_widths={"a": 512, "t": 768, "v": 1024}, num_classes=2, hidden_dim=500, tensor_rank=10,
                   learning_rate=1.9e-4, alpha=0.4, beta=0.2, batch_size=32, epochs=30),
    "mosei7": dict(input_widths={"a": 512, "t": 768, "v": 1024}, num_classes=7, hidden_dim=500, tensor_rank=10,
                   learning_rate=1.9e-4, alpha=0.4, beta=0.2, batch_size=32, epochs=30),
    # CMU-MOSI has no sizes of its own in the paper. Its epochs are six batches long: at the rates above the published head is
    # still at chance when early stopping ends the run.
    "mosi": dict(input_widths={"a": 73, "t": 100, "v": 100}, num_classes=2, hidden_dim=200, tensor_rank=6,
                 learning_rate=5e-4, alpha=0.4, beta=0.2, batch_size=10, epochs=50),
    "synthetic": dict(input_widths={"a": 48, "t": 96, "v": 64}, num_classes=6, hidden_dim=64, tensor_rank=6,
                      learning_rate=5e-4, alpha=0.1, beta=0.5, batch_size=10, epochs=20, dropout=0.3),
}
_PAPER = {
    "iemocap": dict(beta=0.01), "iemocap4": dict(beta=0.01),
    "meld": dict(learning_rate=1.2e-4, alpha=0.4),
}

_RELEASED = dict(
    padding="attended", attention_scale=1.0, ring_order="list", feature_target="gated", feature_reduction="mean",
    cosine_norm="classes", cosine_scale=1.0, cosine_bias=True, head="none", score_from="linear", noise="gradient",
    clip_order="before", dev_split="first_tenth", modulation_start=4,
)
_PUBLISHED = dict(
    padding="masked", attention_scale=None, ring_order="ring", feature_target="attention", feature_reduction="sum",
    cosine_norm="features", cosine_scale=10.0, cosine_bias=False, head="mlp", score_from="cosine", noise="parameter",
    clip_order="before", dev_split="official", modulation_start=1,
)


@dataclass(frozen=True)
class Ada2IConfig:
    """All options of Ada2I. Use `published(dataset)` or `released(dataset)`, then change fields by name.

    Sizes
        modalities: their names, in the order that `released` semantics depend on (the digits of "atv").
        input_widths: {modality: d_m}.  num_classes: C.  hidden_dim: D.  tensor_rank: R.
        encoder: "transformer" | "lstm"; encoder_layers; encoder_heads {modality: heads} or None (the first of 5..14 that
        divides the input width, else 1); feedforward_dim.
        afw, afw_layers: feature weighting on/off and its depth.  amw: cosine fusion on, or a linear map of the concatenation.
        beta: gate of AFW, eq. 7.  dropout: probability, encoder and AFW.

    Where the released code and the paper differ
        padding: "attended" (padded rows are ordinary rows) | "masked".
        attention_scale: factor s of Theta = s G_Q * G_K; None is 1 / sqrt(tensor_rank), eq. 4.
        ring_order: "list" | "ring" (t <- a, v; a <- v, t; v <- t, a).
        feature_target: Phi(Z) is compared with the "gated" output or with the "attention", eq. 12.
        feature_reduction: "mean" over all modalities' elements at once | "sum" over modalities of each one's mean.
        cosine_norm: weights of unit norm over "classes" | over "features", eq. 8.
        cosine_scale: temperature of the cosines.  cosine_bias: b / M in every modality's logits.
        head: "none" | "mlp", eq. 9, C -> head_expansion * C -> C with ReLU, its cross-entropy added, eq. 14.
        score_from: disparity scores from "linear" logits | from the "cosine" logits.
        noise: "none" | "gradient" (on g after modulation, before Adam) | "parameter" (after the update, std of g before modulation).
        clip_order: gradient clipping "before" | "after" modulation.
        dev_split: "official" | "first_tenth" of the training conversations | "random_tenth".

    Training
        modulation on/off, from epoch modulation_start to modulation_end; alpha: its strength; learning_rate; weight_decay;
        clip_norm (0 switches clipping off), clip_norm_type; batch_size in dialogues; epochs; early_stopping: epochs without
        a better dev W-F1; scheduler_factor, scheduler_patience of ReduceLROnPlateau on the dev loss; seed.

    Raises ValueError naming the option, what was expected and what came.
    """

    modalities: tuple[str, ...] = ("a", "t", "v")
    input_widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"a": 512, "t": 768, "v": 1024})
    num_classes: int = 6
    hidden_dim: int = 300
    tensor_rank: int = 11
    encoder: str = "transformer"
    encoder_layers: int = 2
    encoder_heads: Mapping[str, int] | None = None
    feedforward_dim: int = 2048
    afw: bool = True
    afw_layers: int = 2
    amw: bool = True
    beta: float = 0.01
    dropout: float = 0.5

    padding: str = "masked"
    attention_scale: float | None = None
    ring_order: str = "ring"
    feature_target: str = "attention"
    feature_reduction: str = "sum"
    cosine_norm: str = "features"
    cosine_scale: float = 10.0
    cosine_bias: bool = False
    head: str = "mlp"
    head_expansion: int = 4
    score_from: str = "cosine"
    noise: str = "parameter"
    clip_order: str = "before"
    dev_split: str = "official"

    modulation: bool = True
    modulation_start: int = 1
    modulation_end: int = 3000
    alpha: float = 0.037
    learning_rate: float = 1.7e-4
    weight_decay: float = 1e-8
    clip_norm: float = 2.0
    clip_norm_type: float = 2.0
    batch_size: int = 10
    epochs: int = 50
    early_stopping: int = 20
    scheduler_factor: float = 0.1
    scheduler_patience: int = 10
    seed: int = 12

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (the dataclass is frozen)
        if isinstance(self.modalities, (str, list)):
            put("modalities", tuple(self.modalities))
        names = self.modalities
        if not isinstance(names, tuple) or not names or not all(isinstance(m, str) and m and "." not in m for m in names):
            raise ValueError(f"modalities: expected one or more names such as 'atv' or ['a', 't'], got {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"modalities: expected each name once, got {''.join(names)!r}")
        if not isinstance(self.input_widths, Mapping):
            raise ValueError(f"input_widths: expected a mapping from modality to width, got {self.input_widths!r}")
        put("input_widths", dict(self.input_widths))
        for m in names:
            width = self.input_widths.get(m)
            if not _is(width, int) or width < 1:
                raise ValueError(f"input_widths: expected a positive integer for modality {m!r}, got {width!r} "
                                 f"(known: {', '.join(sorted(self.input_widths))})")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name, (kind, lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "attention_scale":
                continue
            if kind is float and _is(value, int):
                put(name, value := float(value))
            if not _is(value, kind) or not math.isfinite(value):
                raise ValueError(f"{name}: expected {'an integer' if kind is int else 'a finite number'}, got {value!r}")
            if (lowest is not None and value < lowest) or (highest is not None and value > highest):
                raise ValueError(f"{name}: expected a value {_span(lowest, highest)}, got {value!r}")
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected a probability below 1, got {self.dropout!r}")
        for name in ("afw", "amw", "cosine_bias", "modulation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.encoder == "lstm" and self.hidden_dim % 2:
            raise ValueError(f"hidden_dim: expected an even number with the lstm encoder (half per direction), got {self.hidden_dim}")
        if self.encoder_heads is not None:
            put("encoder_heads", dict(self.encoder_heads))
            for m, heads in self.encoder_heads.items():
                if not _is(heads, int) or heads < 1 or self.input_widths.get(m, 0) % heads:
                    raise ValueError(f"encoder_heads: expected a divisor of the width {self.input_widths.get(m)} for modality {m!r}, got {heads!r}")

    # -- derived -----------------------------------------------------------------------------------------------------

    def heads(self, modality: str) -> int:
        """Attention heads of a modality's encoder: as given, or the first of 5..14 that divides its width, else 1."""
        if self.encoder_heads and modality in self.encoder_heads:
            return self.encoder_heads[modality]
        width = self.input_widths[modality]
        return next((h for h in range(5, 15) if width % h == 0), 1)

    @property
    def theta_scale(self) -> float:
        """Scale of Theta = scale * (G_Q * G_K), eq. 4."""
        return self.tensor_rank ** -0.5 if self.attention_scale is None else self.attention_scale

    @property
    def ring(self) -> tuple[tuple[int, ...], ...]:
        """For each modality the others, as positions in `modalities`, in the order in which they are contracted.

        "ring": onwards around t -> a -> v -> t, further names behind these in list order; "list": as listed.
        """
        count = range(len(self.modalities))
        if self.ring_order == "list":
            return tuple(tuple(l for l in count if l != j) for j in count)
        around = sorted(count, key=lambda j: ("tav".find(self.modalities[j]) % 4, j))
        place = {j: i for i, j in enumerate(around)}
        return tuple(tuple(around[(place[j] + step) % len(around)] for step in count[1:]) for j in count)

    def replace(self, **changes: Any) -> "Ada2IConfig":
        """A copy with some fields changed; an unknown name raises ValueError with the nearest known ones."""
        return dataclasses.replace(self, **_known(changes))

    # -- presets and doors -------------------------------------------------------------------------------------------

    @classmethod
    def released(cls, dataset: str = "iemocap", **changes: Any) -> "Ada2IConfig":
        """What the authors' released code computes, with the sizes and rates of its run script for `dataset`."""
        return cls(**{**_dataset(dataset), **_RELEASED, **_known(changes)})

    @classmethod
    def published(cls, dataset: str = "iemocap", **changes: Any) -> "Ada2IConfig":
        """What the paper describes, with the paper's sizes and rates for `dataset`."""
        return cls(**{**_dataset(dataset), **_PAPER.get(dataset, {}), **_PUBLISHED, **_known(changes)})

    @classmethod
    def preset(cls, name: str, dataset: str = "iemocap", **changes: Any) -> "Ada2IConfig":
        """`released` or `published` by name."""
        if name not in ("released", "published"):
            raise ValueError(f"preset: expected released or published, got {name!r}")
        return getattr(cls, name)(dataset, **changes)

    @classmethod
    def from_namespace(cls, args: Any) -> "Ada2IConfig":
        """Released semantics from the released script's argparse Namespace."""
        def get(name):
            try:
                return getattr(args, name)
            except AttributeError:
                raise ValueError(f"args: expected the released script's namespace, it lacks {name!r}") from None
        dataset, emotion = get("dataset"), get("emotion")
        labels = get("dataset_label_dict")["mosei7" if emotion == "7class" else "mosei2" if emotion else dataset]
        widths = get("embedding_dim")
        if dataset not in widths:
            raise ValueError(f"args.embedding_dim: expected widths for dataset {dataset!r}, it has {', '.join(widths)}")
        modulation = bool(get("modulation"))
        return cls(
            modalities=tuple(get("modalities")), input_widths=widths[dataset], num_classes=len(labels),
            hidden_dim=get("hidden_dim"), tensor_rank=get("tensor_rank"), encoder=get("encoder_modules"),
            encoder_layers=get("encoder_nlayers"), afw=not get("no_mmt"), afw_layers=get("mmt_nlayers"),
            amw=bool(get("mmcosine")), beta=get("beta"), dropout=get("drop_rate"), modulation=modulation,
            alpha=get("alpha"), **{**_RELEASED, "noise": "gradient" if get("normalize") else "none"})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Ada2IConfig":
        """The inverse of `to_dict`."""
        return cls(**_known(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: it survives JSON and TOML."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _dataset(name: str) -> dict[str, Any]:
    if name not in _DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(_DATASETS)}; got {name!r}")
    return _DATASETS[name]


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(Ada2IConfig)]
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 3)
            raise ValueError(f"unknown option {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return dict(values)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _span(lowest, highest) -> str:
    if highest is None:
        return f"of at least {lowest}"
    return f"from {lowest} to {highest}"
