"""`python ops/load`: the parts are found from here, wherever it is called from."""

import sys
from pathlib import Path

OPS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(OPS), str(OPS / "bench")]

from load.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
