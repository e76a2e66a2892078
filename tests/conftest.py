"""Settings of all tests, and the golden cases as a fixture."""

from __future__ import annotations

import pytest
import torch

from model_cases import GOLDEN, GoldenCase

torch.set_num_threads(1)        # the tensors here are tiny; tests of threading set their own number


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=sorted(p.stem for p in GOLDEN.glob("*.json")))
def golden(request) -> GoldenCase:
    return GoldenCase(request.param)
