"""Variables in a shell's language: what it exports, and what it unsets."""

import os
import sys
from collections.abc import Callable, Collection, Mapping

from keybroker import foreign

_SINGLE_QUOTES = "'\u2018\u2019\u201a\u201b"


def _sh(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _fish(text: str) -> str:
    """Only the quote and the backslash mean something. See fish-language, Quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell(text: str) -> str:
    """Five characters are single quotes, and each is doubled. See about_Quoting_Rules."""
    return "'" + "".join(one * 2 if one in _SINGLE_QUOTES else one for one in text) + "'"


# How a shell sets a variable, and how it takes one out that may not be there.
SHELLS: dict[str, tuple[Callable[[str, str], str], Callable[[str], str]]] = {
    "sh": (lambda name, value: f"export {name}={_sh(value)}", lambda name: f"unset {name}"),
    "fish": (
        lambda name, value: f"set -gx {name} {_fish(value)}",
        lambda name: f"set -e {name}",
    ),
    "powershell": (
        lambda name, value: f"$env:{name} = {_powershell(value)}",
        lambda name: f"Remove-Item Env:{name} -ErrorAction SilentlyContinue",
    ),
}


def print_environment(shell: str, values: Mapping[str, str], keep: Collection[str]) -> None:
    """Print a line for each variable that is set, and for each that leads elsewhere."""
    export, unset = SHELLS[shell]
    names = dict.fromkeys([*foreign.NAMES, *foreign.found(os.environ)])
    lines = [unset(name) for name in names if name not in values and name not in keep]
    lines += [export(name, value) for name, value in values.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def yours() -> str:
    """Return whose language the user's shell speaks, as far as SHELL says."""
    name = os.path.basename(os.environ.get("SHELL", ""))
    return {"fish": "fish", "pwsh": "powershell"}.get(name, "sh")
