"""Tensor-ring attention, gate and dropout alone: `ada2i_fast.ops.tensor_ring`, three modalities."""

import pytest

from .cases import cases
from .measure import clock

COMPILED = {("iemocap", "training", "float32")}


@pytest.mark.benchmark(timer=clock)
def test_tensor_ring(case, implementation, record):
    record(case, implementation)


test_tensor_ring.cases = cases("tensor_ring", COMPILED)
