"""`python cli.py ...` in a checkout does the same as `mlxspec ...`."""

from mlxspec.__main__ import main

if __name__ == "__main__":
    main()
