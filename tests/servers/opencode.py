"""The real OpenCode, kept away from this machine's accounts and from the network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.servers.claude import Result
from tests.servers.install import opencode_program

_NOBODY = "http://127.0.0.1:9"


def run_opencode(
    environment: Mapping[str, str], project: Path, *words: str, timeout: float = 90
) -> Result:
    """Run it in a project, with a home's environment and nothing else."""
    done = subprocess.run(
        [str(opencode_program()), *words],
        cwd=project,
        env={
            **environment,
            "PATH": os.defpath,
            "HTTP_PROXY": _NOBODY,
            "HTTPS_PROXY": _NOBODY,
            "NO_PROXY": "127.0.0.1,localhost",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)
