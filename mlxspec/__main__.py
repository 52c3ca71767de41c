"""`python -m mlxspec`, and the installed command."""

import sys


def main() -> None:
    """Run the command line; a person may interrupt it even while it is imported."""
    try:
        from mlxspec.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
