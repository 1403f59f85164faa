"""
Write what is shipped beside the package into a folder: `generate.py FOLDER SECONDS`.

    man/man1/keybroker*.1                     manual pages, dated as the second argument says
    bash-completion/, zsh/, fish/             completion
    keybroker.cdx.json                        a bill of materials

It is a process of its own, so that what it describes is this source and nothing that is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.dont_write_bytecode = True


def main(folder: Path, date: int) -> None:
    """Write all of it."""
    import completion
    import manual
    import sbom

    (folder / "man" / "man1").mkdir(parents=True)
    manual.write(folder / "man" / "man1", date)
    completion.write(folder)
    sbom.write(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
