"""Other programs' settings: what each surface of Claude Code needs, done and undone."""

from importlib import import_module
from typing import Any

# What can be connected, and in a few words what it is.
SURFACES = {
    "claude": "Claude Code on the command line",
}


def surface(name: str) -> Any:
    """Return the module of a surface."""
    return import_module(f"keybroker.connect.{name.replace('-', '_')}")
