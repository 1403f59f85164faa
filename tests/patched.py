"""Workers and daemons that differ from the real one in a line or two: blocked, slow, dying."""

import sys
from pathlib import Path
from typing import Any

import keybroker
from keybroker.config import Profile, read_profile
from keybroker.document import Where


def profile_at(url: str, name: str = "work", **source: Any) -> Profile:
    """A minting profile of a gateway, whose admin key is in the variable ADMIN."""
    raw = {
        "base_url": url,
        "source": {"type": "litellm", "admin": {"env": "ADMIN"}, "lifetime": "2h", **source},
    }
    return read_profile(name, raw, Where({}, "test"))


def worker_with(patch: str) -> tuple[str, ...]:
    """
    Return the command of a worker that runs some lines before it serves.

    The lines see `worker`, the module, and `Operations`; what a pool adds (parent, state) is in
    `sys.argv` as for the real one.
    """
    code = (
        "import os, signal, sys, time\n"
        "from keybroker import worker\n"
        "from keybroker.worker import Operations\n"
        f"{patch}\n"
        "worker.main()\n"
    )
    return (sys.executable, "-I", "-c", code)


# Operations whose place is taken: `forget` is one that every worker has and that needs nothing.
REPORT = """
def report(self, profile):
    import ctypes, resource
    libc = ctypes.CDLL(None)
    death = ctypes.c_int(0)
    if sys.platform == "linux":
        libc.prctl(2, ctypes.byref(death), 0, 0, 0)
    return {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "dumpable": libc.prctl(3, 0, 0, 0, 0) if sys.platform == "linux" else None,
        "death": death.value,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "umask": os.umask(0o077),
        "descriptors": [fd for fd in range(256) if _is_open(fd)],
        "argv": sys.argv[1:],
        "flags": sys.flags.isolated,
    }

def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

Operations.forget = report
"""
# Says that it is there through the FIFO `reached`, then waits in C for a signal that never comes.
HANG = """
def hang(self, profile):
    os.close(os.open(self.state / "reached", os.O_WRONLY))
    signal.pause()

Operations.forget = hang
"""


def daemon_with(patch: str, state: Path, socket: Path, *, worker: str = "") -> list[str]:
    """
    Return the command of a daemon that runs some lines before it begins.

    The lines see `kernel` and `listening`; with `worker`, its workers run lines of their own, as
    those of `worker_with`.
    """
    code = (
        "import os, signal, sys, time\n"
        "sys.path.append(sys.argv.pop(1))\n"
        "from keybroker import kernel, listening\n"
        f"{patch}\n"
    )
    if worker:
        code += f"from keybroker import pool\npool.COMMAND = {worker_with(worker)!r}\n"
    package = str(Path(keybroker.__file__).parent.parent)
    places = [package, str(state), str(socket), "text"]
    return [sys.executable, "-IS", "-c", f"{code}listening.main()\n", *places]
