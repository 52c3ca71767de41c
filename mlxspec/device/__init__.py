"""The machine: memory, kernels, what is compiled, and how long caches are."""
