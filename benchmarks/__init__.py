"""Benchmarks of ada2i_fast. `pytest benchmarks/ --benchmark-only`, or `python -m benchmarks.run` to keep the result."""
