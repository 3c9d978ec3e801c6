"""Turn the packaged SmolLM2 into a safetensors directory: python jobs/prepare_model.py OUT [--layers N]."""

from __future__ import annotations

import argparse
import sys

from rayrm.demo.base_model import prepare_model
from rayrm.errors import RayrmError


def main() -> int:
    """Parse the command line and write the model; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="a new directory")
    parser.add_argument("--layers", type=int, help="keep the first so many of the 30 layers")
    asked = parser.parse_args()
    try:
        print(prepare_model(asked.out, asked.layers))
    except RayrmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
