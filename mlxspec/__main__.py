"""`python -m mlxspec` does the same as `mlxspec`."""

from mlxspec.app import main

if __name__ == "__main__":
    main()
