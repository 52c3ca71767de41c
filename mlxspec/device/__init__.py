"""The machine: memory, kernels, compiling, and the lengths of caches."""
