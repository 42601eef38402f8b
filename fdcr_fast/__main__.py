"""Entry point of ``fdcr-fast`` and ``python -m fdcr_fast``; the command ``info`` needs no extra."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

SIM_PACKAGES = ("click", "matplotlib", "pydantic", "rich", "safetensors", "sklearn", "torchvision", "yaml")


def main() -> None:
    """Run the command line."""
    sys.path.append(os.getcwd())  # where a user's own model and data are imported from, as by python -m
    missing = [package for package in SIM_PACKAGES if find_spec(package) is None]
    if not missing:
        from fdcr_fast.cli import cli

        cli(prog_name="fdcr-fast")
    elif sys.argv[1:] in ([], ["info"], ["info", "--self-test"]):
        import fdcr_fast
        from fdcr_fast.self_test import self_test

        print(fdcr_fast.info())
        if "--self-test" in sys.argv and not self_test():
            sys.exit(1)
    else:
        sys.exit(f'fdcr-fast {sys.argv[1]} needs {", ".join(missing)}; install them with: pip install "fdcr_fast[sim]"')


if __name__ == "__main__":
    main()
