"""What the shells load to complete our commands: click's scripts, which ask the program."""

from __future__ import annotations

from pathlib import Path

from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from keybroker.cli.base import keybroker

# Where each shell finds it by itself, below `share`.
FILES: dict[str, type[ShellComplete]] = {
    "bash-completion/completions/keybroker": BashComplete,
    "zsh/site-functions/_keybroker": ZshComplete,
    "fish/vendor_completions.d/keybroker.fish": FishComplete,
}


def write(folder: Path) -> None:
    """Write a script for each shell, each in the folder that it looks in."""
    for name, kind in FILES.items():
        script = kind(keybroker, {}, "keybroker", "_KEYBROKER_COMPLETE")
        file = folder / name
        file.parent.mkdir(parents=True)
        # not `script.source()`, which wants the shell to be there
        text = ShellComplete.source(script)
        # fish: a command's description may have a comma in it
        file.write_text(text.replace('string split ","', 'string split -m 1 ","'))
