"""The entry point, also of python -m edgert. What takes time to import is imported where Ctrl-C is caught."""

import sys


def main() -> int:
    """Run the command line and return its exit status; of edgert.cli.main, or 130 for Ctrl-C."""
    try:
        from edgert.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        if sys.stderr is not None:  # closed by the caller
            print("edgert: interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
