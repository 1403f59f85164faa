"""A session as it is carried: over a worker's pipe, and into a sealed file. Secrets leave here."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from keybroker.credential import Secret, Session
from keybroker.journal import read_time, write_time

TIMES = ("issued_at", "expires_at", "renewed_at", "not_before")


def encode_session(session: Session) -> dict[str, Any]:
    """Return a session as plain values, its secrets among them."""
    values: dict[str, Any] = {"key": session.key, "serial": session.serial}
    for name in ("secret", "kept"):
        if (secret := getattr(session, name)) is not None:
            values[name] = secret.reveal()
    for name in TIMES:
        if (moment := getattr(session, name)) is not None:
            values[name] = write_time(moment)
    values.update(renewable=session.renewable, material=session.material)
    values.update(failures=session.failures, refusals=session.refusals, trouble=session.trouble)
    return values


def decode_session(found: Mapping[str, Any]) -> Session:
    """Read a session back; ValueError, KeyError or TypeError when it is not one."""
    trouble = found["trouble"]
    times: dict[str, datetime] = {n: read_time(found[n]) for n in TIMES if n in found}
    return Session(
        key=str(found["key"]),
        serial=int(found["serial"]),
        secret=Secret(found["secret"]) if "secret" in found else None,
        kept=Secret(found["kept"]) if "kept" in found else None,
        issued_at=times.get("issued_at"),
        expires_at=times.get("expires_at"),
        renewed_at=times.get("renewed_at"),
        not_before=times.get("not_before"),
        renewable=bool(found["renewable"]),
        material=str(found["material"]),
        failures=int(found["failures"]),
        refusals=int(found["refusals"]),
        trouble=None if trouble is None else (trouble[0], trouble[1], trouble[2]),
    )
