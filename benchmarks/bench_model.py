"""The whole model: a training step (forward, backward, clip, modulation, noise, Adam) and an evaluation forward.

The textbook steps with `reference.balanced_step` over torch's Adam, unfused, its disparity score vectorised.
"""

import pytest

from .cases import IEMOCAP, MELD, MOSEI, Case
from .measure import clock


@pytest.mark.benchmark(timer=clock)
def test_model(case, implementation, record):
    record(case, implementation)


test_model.cases = [
    Case("model", IEMOCAP, "training", "float32", compiled=True),
    Case("model", MELD, "training", "float32", compiled=True),
    Case("model", MOSEI, "training", "float32"),
    Case("model", IEMOCAP, "training", "float32", preset="released"),
    Case("model", MELD, "training", "float32", preset="released"),
    Case("model", IEMOCAP, "training", "bfloat16"),
    Case("model", MELD, "training", "bfloat16"),
    Case("model", IEMOCAP, "evaluation", "float32"),
    Case("model", MELD, "evaluation", "float32"),
    Case("model", IEMOCAP, "evaluation", "float32", preset="released"),
]
