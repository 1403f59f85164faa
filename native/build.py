"""
Put what is made into what is packed: the native helper, manual pages, completion, an SBOM.

The helper is in the wheel where there is a compiler. Where there is none the wheel is one for every
machine, with all else. `CC` names the compiler; one that is not there, as in
`CC=/nonexistent pip install .`, does without.

The same source gives the same bytes, wherever and whenever: what has a date has that of the last
commit, or what `SOURCE_DATE_EPOCH` says.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.utils import get_reproducible_timestamp
from packaging.tags import sys_tags

NAME = "keybroker-key"
SOURCE = Path(__file__).with_name("key.c")
ROOT = SOURCE.parent.parent
USAGE = 2  # its exit status when it is given nothing
OPTIONS = ("-O2", "-s", "-Wl,--build-id=none")
GENERATE = ROOT / "share" / "generate.py"
SHARED = ("man", "bash-completion", "zsh", "fish")  # folders of what that one writes
SBOM = "keybroker.cdx.json"


class Made(BuildHookInterface[Any]):
    """What hatchling runs before it packs; before an editable installation too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make all of it, and say where it is and where it goes."""
        self._folder = tempfile.TemporaryDirectory(prefix="keybroker-")
        made = Path(self._folder.name, "share")
        os.environ["SOURCE_DATE_EPOCH"] = str(date())  # hatchling's own files have it, too
        subprocess.run([sys.executable, GENERATE, made, str(date())], check=True)
        shared = {str(made / name): f"share/{name}" for name in SHARED}
        if self.target_name == "sdist":
            build_data["force_include"].update(shared)
            return
        build_data["shared_data"].update(shared)
        build_data["sbom_files"].append(str(made / SBOM))
        self._add_helper(build_data)

    def _add_helper(self, build_data: dict[str, Any]) -> None:
        """Compile the helper, and have it installed beside the command."""
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


def date() -> int:
    """Return when the source was as it is, in seconds since 1970."""
    if told := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(told)
    if (ROOT / "PKG-INFO").exists():  # a source distribution, whose files are dated so
        return int((ROOT / "PKG-INFO").stat().st_mtime)
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        with suppress(OSError, ValueError):
            return int(subprocess.run(git, capture_output=True).stdout)
    return get_reproducible_timestamp()


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
