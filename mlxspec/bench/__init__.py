"""Benchmarks: `python -m mlxspec.bench.rounds` and its neighbours."""
