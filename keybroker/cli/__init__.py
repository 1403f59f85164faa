"""Words for people; one module a group of commands, imported when it is typed."""

import sys


def main() -> None:
    """The console script: errors become one line on stderr and a documented exit status."""
    from keybroker.cli.base import run

    sys.exit(run(sys.argv[1:]))
