"""
Put the native helper into the wheel, where there is a compiler.

Where there is none the wheel is one for every machine, with all but the native helper. `CC` names
the compiler; one that is not there, as in `CC=/nonexistent pip install .`, does without.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

NAME = "keybroker-key"
SOURCE = Path(__file__).with_name("key.c")
USAGE = 2  # its exit status when it is given nothing
OPTIONS = ("-O2", "-s")


class NativeHelper(BuildHookInterface[Any]):
    """What hatchling runs before it packs a wheel, one for an editable installation too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the helper, and have it installed beside the command."""
        self._folder = tempfile.TemporaryDirectory(prefix="keybroker-")
        program = compile_helper(Path(self._folder.name))
        if program is None:
            self.app.display_warning(f"{NAME} is left out: no C compiler whose programs run here")
            return
        platforms = (tag.platform for tag in sys_tags())
        platform = next(one for one in platforms if not one.startswith(("many", "musl")))
        build_data["shared_scripts"][str(program)] = NAME
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Drop what is packed by now."""
        self._folder.cleanup()


def compile_helper(folder: Path) -> Path | None:
    """Compile the helper into a folder; None where nobody can, or where its result does not run."""
    for command in compilers():
        program = folder / NAME
        try:
            done = subprocess.run(
                [*command, *OPTIONS, "-o", str(program), str(SOURCE)], capture_output=True
            )
            if done.returncode == 0 and _runs(program):
                return program
        except OSError:  # there is no such compiler
            continue
    return None


def compilers() -> Iterator[list[str]]:
    """
    Yield what to try, the best first.

    Nothing has to be looked for and linked when a static program starts. With musl it also starts
    without asking the processor what it can do, which glibc does and which takes a virtual machine
    longer than all the rest.
    """
    if sys.platform != "linux":
        return
    if chosen := os.environ.get("CC"):
        yield [*shlex.split(chosen), "-static"]
        yield shlex.split(chosen)
        return
    yield ["musl-gcc", "-static"]
    yield ["cc", "-static"]
    yield ["cc"]


def _runs(program: Path) -> bool:
    """Say whether it does, which one that was compiled for another machine does not."""
    done = subprocess.run([program], stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode == USAGE
