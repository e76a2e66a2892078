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


@pytest.fixture
def captured():
    """captured(step): a CUDA graph of the step, which has run on a side stream before, and what its capture returned."""
    def capture(step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        return graph, result

    return capture


@pytest.fixture(params=sorted(p.stem for p in GOLDEN.glob("*.json")))
def golden(request) -> GoldenCase:
    return GoldenCase(request.param)
