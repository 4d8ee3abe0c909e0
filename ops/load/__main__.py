"""`python ops/load`: the parts are found from here, wherever it is called from."""

import sys
from pathlib import Path

OPS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(OPS), str(OPS / "bench")]


def main() -> int:
    """The command line, or one of the processes of a replay, which need less of all this."""
    if sys.argv[1:] == ["readers"]:
        from load.readers import main as read

        read()
        return 0
    if sys.argv[1:] == ["sender"]:
        from load.sender import main as send

        send()
        return 0
    from load.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
