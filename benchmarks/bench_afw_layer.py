"""One AFW layer, three modalities: tensor_ring and, in training, attention_mapping with its loss."""

import pytest

from .cases import MANY, Case, cases, scaling
from .measure import clock

COMPILED = {("iemocap", "training", "float32"), ("iemocap", "evaluation", "float32"), ("iemocap", "training", "bfloat16"),
            ("meld", "training", "float32")}


@pytest.mark.benchmark(timer=clock)
def test_afw_layer(case, implementation, record):
    record(case, implementation)


test_afw_layer.cases = cases("afw_layer", COMPILED)


@pytest.mark.scaling
@pytest.mark.benchmark(timer=clock)
def test_scaling(case, implementation, record):
    record(case, implementation)


test_scaling.cases = scaling()


@pytest.mark.scaling
@pytest.mark.benchmark(timer=clock)
def test_many_dialogues(case, implementation, record):
    record(case, implementation)


test_many_dialogues.cases = [Case("afw_layer", MANY, dtype=dtype) for dtype in ("float32", "bfloat16")]
