"""
Take the figures, and write them into `benchmarks/results.json` and README.md.

    .venv/bin/python -m benchmarks              all of them: some minutes
    .venv/bin/python -m benchmarks helper get   these alone; the others stay as they are

Nothing here is asserted: a goal that is missed is a line that says so, and the status is 0. It
is 1 when a figure could not be taken.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

from benchmarks import bench_agent, bench_aws, bench_daemon, bench_get, bench_helper, bench_memory
from benchmarks.measure import Figure, UnmeasurableError, insert, save, table
from benchmarks.programs import compile_parts
from tests.servers.processes import StartError

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "README.md"
BENCHMARKS = {
    "helper": bench_helper.measure,
    "daemon": bench_daemon.measure,
    "memory": bench_memory.measure,
    "get": bench_get.measure,
    "agent": bench_agent.measure,
    "aws": bench_aws.measure,
}


def main() -> int:
    """Measure what the command line names, or everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=" ".join(BENCHMARKS), metavar="NAME")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"{', '.join(sorted(unknown))}: there is {', '.join(BENCHMARKS)}")
    if sys.platform != "linux":
        sys.exit("benchmarks: Linux only: epoll, SO_PEERCRED, /proc")
    found: list[Figure] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="kb-", dir="/tmp") as folder:  # short, for sockets
        try:
            compile_parts(Path(folder))
        except UnmeasurableError as error:
            sys.exit(f"benchmarks: {error}")
        for name in names:
            try:
                for figure in BENCHMARKS[name](Path(folder), _say):
                    _show(figure)
                    found.append(figure)
            except (UnmeasurableError, StartError, OSError) as error:
                _say(f"{name}: not measured: {error}")
                failed = True
    complete = not failed and set(names) == set(BENCHMARKS)
    figures = save(found, _machine(), RESULTS, all_of_them=complete)
    PAGE.write_text(insert(PAGE.read_text("utf-8"), table(figures)), "utf-8")
    return int(failed)


def _show(figure: Figure) -> None:
    verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
    line = f"{figure.shown:>10}  {figure.goal:<14} {verdict:<7} {figure.about}"
    print(line.rstrip(), flush=True)


def _say(line: str) -> None:
    print(f"benchmarks: {line}", file=sys.stderr, flush=True)


def _machine() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
    }


if __name__ == "__main__":
    sys.exit(main())
