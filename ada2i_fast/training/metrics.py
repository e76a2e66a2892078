"""Scores of predicted emotions, through scikit-learn. Fractions from 0 to 1; labels and predictions are int arrays [N]."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from .files import need

__all__ = ["Predictions", "confusion", "evaluate", "report", "scores", "unimodal_scores"]


class Predictions:
    """What a model says about the utterances of some batches, in their order, on the CPU.

    log_prob: float32 [N, C].  unimodal: {modality: [N, C]}.  labels: int64 [N] or None.
    loss: sum over batches of the mean negative log-likelihood, the scheduler's dev loss; None without labels.
    """

    def __init__(self, log_prob, unimodal, labels, loss) -> None:
        self.log_prob, self.unimodal, self.labels, self.loss = log_prob, unimodal, labels, loss

    @property
    def classes(self) -> np.ndarray:
        """The likeliest class per utterance, int64 [N]."""
        return self.log_prob.argmax(1).numpy()

    def scores(self, class_names: Sequence[str]) -> dict[str, Any]:
        """`scores` of the joint prediction, and under "unimodal" the W-F1 and accuracy of every modality alone."""
        return {**scores(self.labels, self.classes, class_names), "unimodal": unimodal_scores(self.labels, self.unimodal)}


@torch.no_grad()
def evaluate(model, batches: Sequence, device=None) -> Predictions:
    """Runs the model in evaluation mode over `DialogueBatch`es, and leaves it in the mode it was in."""
    training = model.training
    model.eval()
    log_prob, unimodal, labels, losses = [], {m: [] for m in model.config.modalities}, [], []
    try:
        for batch in batches:
            batch = batch if device is None else batch.to(device)
            out = model(batch)
            log_prob.append(out.log_prob)
            for m, values in out.unimodal_log_prob.items():
                unimodal[m].append(values)
            if batch.labels is not None:
                labels.append(batch.labels)
                losses.append(F.nll_loss(out.log_prob, batch.labels))
    finally:
        model.train(training)
    return Predictions(
        torch.cat(log_prob).float().cpu(), {m: torch.cat(x).float().cpu() for m, x in unimodal.items()},
        torch.cat(labels).cpu().numpy() if labels else None, sum(torch.stack(losses).tolist()) if losses else None)


def scores(labels, predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """{"weighted_f1", "accuracy", "macro_f1", "f1": {class: F1}}; a class that never occurs and is never predicted has F1 0."""
    metrics = need("sklearn.metrics", "evaluation")
    index = range(len(class_names))
    per_class = metrics.f1_score(labels, predictions, labels=index, average=None, zero_division=0)
    return {
        "weighted_f1": float(metrics.f1_score(labels, predictions, labels=index, average="weighted", zero_division=0)),
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "macro_f1": float(per_class.mean()),
        "f1": {name: float(value) for name, value in zip(class_names, per_class)},
    }


def unimodal_scores(labels, unimodal: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """{modality: {"weighted_f1", "accuracy"}} from {modality: log-probabilities [N, C]}."""
    result = {}
    for m, log_prob in unimodal.items():
        found = scores(labels, log_prob.argmax(1).numpy(), [str(c) for c in range(log_prob.shape[1])])
        result[m] = {"weighted_f1": found["weighted_f1"], "accuracy": found["accuracy"]}
    return result


def confusion(labels, predictions, num_classes: int) -> np.ndarray:
    """Utterances by (true class, predicted class), int64 [C, C]."""
    return need("sklearn.metrics", "evaluation").confusion_matrix(labels, predictions, labels=range(num_classes))


def report(labels, predictions, class_names: Sequence[str], as_dict: bool = False):
    """scikit-learn's classification report, as text or as a dictionary."""
    return need("sklearn.metrics", "evaluation").classification_report(
        labels, predictions, labels=range(len(class_names)), target_names=list(class_names), digits=4, zero_division=0,
        output_dict=as_dict)
