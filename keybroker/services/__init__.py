"""Service managers: what keeps the daemon running from a login, or a boot, on."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from keybroker.errors import ConfigError

if TYPE_CHECKING:
    from keybroker.services.launchd import Launchd
    from keybroker.services.systemd import Systemd


def service_manager(environment: Mapping[str, str], *, system: bool = False) -> "Systemd | Launchd":
    """
    Return who runs services on this system: of this user, or of the whole system.

    Raises:
        ConfigError: It has no service manager that is known here.
    """
    if sys.platform == "linux":
        from keybroker.services.systemd import Systemd

        return Systemd(environment, system=system)
    if sys.platform == "darwin" and not system:
        from keybroker.services.launchd import Launchd

        return Launchd(environment)
    raise ConfigError(
        "service: systemd and, for one user, launchd are known",
        hint="the daemon needs no service: `keybroker get` starts it",
    )


def installed(environment: Mapping[str, str]) -> "Systemd | Launchd | None":
    """Return the manager that runs this user's daemon; None where no service is installed."""
    if sys.platform not in ("linux", "darwin"):
        return None
    found = service_manager(environment)
    return found if found.installed else None
