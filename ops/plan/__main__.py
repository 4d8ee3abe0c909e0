"""The door of `python ops/plan`: program.py says what it does."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from ops.bench.terminal import answered  # noqa: E402  the project's folder has to be on the path first
from ops.plan.program import main  # noqa: E402

sys.exit(answered(main))
