"""`mlxspec bench`, and measurements beside it, which `python -m mlxspec.bench` names."""
