"""Comparisons with pytest-benchmark: `make bench`, or `python -m pytest benchmarks`."""
