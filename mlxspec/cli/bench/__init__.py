"""`mlxspec bench`: its options, what it shows while it measures, and its results."""
