"""One key of the development gateway: when it ends, what it may call, how it prints."""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any

from keybroker.devgateway.refusals import Json

MINIMUM_KEY_LENGTH = 16

_OWNER = "default_user_id"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_WORDS = {"hourly": "1h", "daily": "24h", "weekly": "7d", "monthly": "30d"}
# What a key of a type may call, by the name that its refusal quotes.
_ROUTES = {
    "llm_api": ("llm_api_routes", ("/v1/messages", "/v1/models")),
    "management": ("management_routes", ("/key/",)),
    "read_only": ("info_routes", ("/key/info", "/key/list", "/v1/models")),
}
# Columns of the real table that nothing here uses; an adapter may still look for them.
_UNUSED: Json = {
    "agent_id": None,
    "aliases": {},
    "allowed_cache_controls": [],
    "auto_rotate": False,
    "budget_id": None,
    "budget_reset_at": None,
    "config": {},
    "last_active": None,
    "organization_id": None,
    "permissions": {},
    "project_id": None,
    "rotation_count": 0,
    "rotation_interval": None,
    "soft_budget_cooldown": False,
    "tpd_limit": None,
    "created_by": _OWNER,
    "updated_by": _OWNER,
}


def token_of(key: str) -> str:
    """Compute the id of a key, or pass an id through: LiteLLM takes both everywhere."""
    return sha256(key.encode()).hexdigest() if key.startswith("sk-") else key


def name_of(key: str) -> str:
    """Shorten a key to what may be printed."""
    return f"sk-...{key[-4:]}" if len(key) >= MINIMUM_KEY_LENGTH else "sk-..."


def masked(text: str) -> str:
    """Shorten what may or may not be a key."""
    return f"{text[:4]}****{text[-4:]}" if len(text) > 8 else "****"


def end_of(duration: str, now: datetime) -> datetime:
    """
    Compute when a key asked for with this duration ends.

    LiteLLM matches a prefix: `8hours` is 8 h, `500ms` is 500 minutes, a bare number is an error.

    Raises:
        ValueError: With LiteLLM's own message.
    """
    found = re.match(r"(\d+)(mo|[smhdw]?)", _WORDS.get(duration.strip().lower(), duration))
    if found is None:
        raise ValueError("Invalid duration format")
    count, unit = int(found[1]), found[2]
    if unit == "":
        raise ValueError(f"Unsupported duration unit, passed duration: {duration}")
    try:
        if unit != "mo":
            return now + timedelta(seconds=count * _UNITS[unit])
        years, month = divmod(now.month - 1 + count, 12)
        last = calendar.monthrange(now.year + years, month + 1)[1]
        return now.replace(year=now.year + years, month=month + 1, day=min(now.day, last))
    except (OverflowError, ValueError) as error:
        raise ValueError("Python int too large to convert to C int") from error


def stored(moment: datetime) -> datetime:
    """Round a moment down to milliseconds, which is what the database keeps."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def stamp(moment: datetime, zulu: bool = False) -> str:
    """Write a moment with six digits, and UTC as `Z` or, in other answers, as `+00:00`."""
    text = moment.astimezone(UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z") if zulu else text


@dataclass(slots=True)
class Row:
    """One key, known by its hash only."""

    token: str
    key_name: str
    key_alias: str | None
    expires: datetime | None
    models: list[Any]
    metadata: Json
    user_id: str | None
    team_id: str | None
    max_budget: float | None
    budget_duration: str | None
    rpm_limit: int | None
    tpm_limit: int | None
    max_parallel_requests: int | None
    key_type: str
    created_at: datetime
    updated_at: datetime
    settings_updated_at: datetime | None = None
    blocked: bool | None = None
    spend: float = 0.0
    deleted_at: datetime | None = None
    blocked_at: datetime | None = None
    minute: tuple[datetime, int] | None = field(default=None, repr=False)  # its start and count

    @property
    def routes(self) -> list[str]:
        """The name of the group of routes that this key is confined to, or none."""
        return [_ROUTES[self.key_type][0]] if self.key_type in _ROUTES else []

    def may_visit(self, path: str) -> bool:
        """Tell whether the type of this key allows a route."""
        return self.key_type not in _ROUTES or path.startswith(_ROUTES[self.key_type][1])

    def may_call(self, model: str) -> bool:
        """Tell whether this key may call a model: no list is all, and `claude-*` is a pattern."""
        return not self.models or any(fnmatchcase(model, str(name)) for name in self.models)

    def status(self, now: datetime) -> str:
        """Name the state of this key: deleted, revoked (blocked), expired or active."""
        if self.deleted_at is not None:
            return "deleted"
        if self.blocked:
            return "revoked"
        return "expired" if self.expires is not None and self.expires < now else "active"

    def printed(self, zulu: bool = False) -> Json:
        """Print the row as JSON."""
        ours = {name: getattr(self, name) for name in self.__slots__}
        del ours["minute"], ours["blocked_at"]
        if self.deleted_at is None:
            del ours["deleted_at"]
        moments = {
            name: stamp(value, zulu) for name, value in ours.items() if isinstance(value, datetime)
        }
        totals = {"allowed_routes": self.routes, "total_spend": self.spend}
        return _UNUSED | ours | moments | totals
