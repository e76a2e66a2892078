"""AMW alone: joint logits, unimodal log-probabilities and, in training, the disparity ratio, three modalities."""

import pytest

from .cases import IEMOCAP, Case, cases
from .measure import clock

COMPILED = {("iemocap", "training", "float32"), ("iemocap", "evaluation", "float32"), ("meld", "training", "float32")}


@pytest.mark.benchmark(timer=clock)
def test_cosine_fusion(case, implementation, record):
    record(case, implementation)


test_cosine_fusion.cases = [*cases("cosine_fusion", COMPILED), Case("cosine_fusion", IEMOCAP, preset="released")]
