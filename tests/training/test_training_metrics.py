import numpy as np
import pytest
import torch

from ada2i_fast import Ada2I
from ada2i_fast.training import batches, evaluate, metrics, report, scores

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 1])
NAMES = ["a", "b", "c", "d"]


def test_scores_by_hand():
    # a: precision 2/2, recall 2/3, F1 4/5. b: precision 1/3, recall 1/2, F1 2/5. c: 0. d: never there.
    found = scores(LABELS, PREDICTED, NAMES)
    assert found["f1"] == pytest.approx({"a": 0.8, "b": 0.4, "c": 0.0, "d": 0.0})
    assert found["weighted_f1"] == pytest.approx((3 * 0.8 + 2 * 0.4) / 6)
    assert found["macro_f1"] == pytest.approx(0.3)
    assert found["accuracy"] == pytest.approx(0.5)


def test_confusion_and_report():
    assert metrics.confusion(LABELS, PREDICTED, 4).tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert report(LABELS, PREDICTED, NAMES, as_dict=True)["a"]["f1-score"] == pytest.approx(0.8)
    assert all(name in report(LABELS, PREDICTED, NAMES) for name in NAMES)


def test_unimodal_scores_are_per_modality():
    right, wrong = torch.eye(4)[torch.tensor(LABELS)], torch.eye(4)[torch.tensor([3] * 6)]
    found = metrics.unimodal_scores(LABELS, {"t": right, "v": wrong})
    assert found == {"t": {"weighted_f1": 1.0, "accuracy": 1.0}, "v": {"weighted_f1": 0.0, "accuracy": 0.0}}


def test_evaluate_sums_the_mean_losses_of_the_batches(corpus, small):
    config = small()
    model = Ada2I(config).train()
    dev = list(batches(corpus, range(6), config))               # batches of 4 and 2
    found = evaluate(model, dev)
    assert model.training
    model.eval()
    with torch.no_grad():
        outs = [model(batch) for batch in dev]
    expected = sum(-out.log_prob[torch.arange(len(b.labels)), b.labels].mean() for out, b in zip(outs, dev))
    assert found.loss == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(found.log_prob, torch.cat([out.log_prob for out in outs]))
    assert found.labels.tolist() == torch.cat([b.labels for b in dev]).tolist()
