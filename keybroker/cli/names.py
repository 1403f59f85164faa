"""The names that a shell completes: profiles and logins of the configuration."""

import os

from keybroker import asking, document, paths
from keybroker.errors import KeybrokerError


def names(table: str, *, system: bool = False) -> list[str]:
    """
    Return the names below a table; none where the configuration cannot be read.

    Args:
        table: Such as `profiles`.
        system: Those of the daemon of a shared host.
    """
    try:
        files = (paths.SYSTEM_CONFIG,) if system else paths.config_files(os.environ)
        found = document.read(files).tables.get(table)
    except (KeybrokerError, OSError):
        return []
    known = found if isinstance(found, dict) else {}
    return [name for name in known if asking.is_name(name.encode())]
