"""Run the command line: `python -m longctx` is the `longctx` command."""

from longctx.cli import run

if __name__ == "__main__":
    run()
