"""The feature loss alone: `ada2i_fast.ops.attention_mapping`, three modalities."""

import pytest

from .cases import cases
from .measure import clock

COMPILED = {("iemocap", "training", "float32")}


@pytest.mark.benchmark(timer=clock)
def test_attention_mapping(case, implementation, record):
    record(case, implementation)


test_attention_mapping.cases = cases("attention_mapping", COMPILED, ("training",))      # evaluation has no loss
