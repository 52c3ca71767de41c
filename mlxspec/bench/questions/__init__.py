"""Measurements that are programs of their own: `python -m mlxspec.bench NAME`."""
