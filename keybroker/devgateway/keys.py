"""
The key table of the development gateway, with LiteLLM's rules and the time as an argument.

The odd rules were seen on a running server and are kept on purpose: a repeated create echoes what
was asked for while the stored key stays as it was, and deleting one known and one unknown key
reports both as deleted. Not locked: one caller at a time.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.devgateway import refusals
from keybroker.devgateway.refusals import Json, checked, flag, invalid, paging
from keybroker.devgateway.row import (
    MINIMUM_KEY_LENGTH,
    Row,
    end_of,
    masked,
    name_of,
    stamp,
    stored,
    token_of,
)

_UPDATE = {
    "key_alias": "string",
    "duration": "string",
    "models": "list",
    "max_budget": "float",
    "user_id": "string",
    "team_id": "string",
    "max_parallel_requests": "int",
    "metadata": "dict",
    "tpm_limit": "int",
    "rpm_limit": "int",
    "budget_duration": "string",
    "key": "string",
}
_GENERATE = _UPDATE | {"key_type": "key_type"}
_KEY_OR_HASH = re.compile(r"(?=.{3,100}\Z)(?:sk-[A-Za-z0-9_-]+|[a-fA-F0-9]{64})")


@dataclass(slots=True)
class Options:
    """
    How this gateway differs from a plain one. May be changed while it runs.

    Args:
        expired_status: 400 is what older LiteLLMs answer for an expired key.
        budget_status: 429 is the older answer to an exhausted budget.
        disable_custom_api_keys: Refuse a secret chosen by the client, with 403.
        unique_aliases: False lets keys share an alias, as concurrent creates do on a real server.
        message_cost: Added to a key's spend by each message, so that a budget can be exceeded.
        rate: Messages a minute for keys without an `rpm_limit` of their own; None is no limit.
        accept_every_key: A data plane that checks nothing: verifying against it proves nothing.
        cache_tail: Seconds for which the data plane still accepts a deleted or blocked key.
        list_lag: Seconds for which a new key is missing from `/key/list` and `/key/aliases`.
        date_skew: How far this gateway's clock is ahead, in its `Date` header and in `expires`.
    """

    expired_status: int = 401
    budget_status: int = 422
    disable_custom_api_keys: bool = False
    unique_aliases: bool = True
    message_cost: float = 0.0
    rate: int | None = None
    accept_every_key: bool = False
    cache_tail: float = 0.0
    list_lag: float = 0.0
    date_skew: timedelta = timedelta(0)


class KeyStore:
    """Every key of the gateway, live and archived."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._rows: dict[str, Row] = {}
        self._archive: dict[str, Row] = {}

    def authenticate(self, key: str, path: str, now: datetime) -> Row:
        """Find the key that was presented; the data plane finds a revoked one for a while."""
        if not key.startswith("sk-"):
            raise refusals.not_ours(masked(key))
        token = token_of(key)
        if row := self._rows.get(token):
            return row
        archived = self._archive.get(token)
        if archived and _is_data_plane(path) and self._in_tail(archived.deleted_at, now):
            return archived
        raise refusals.unknown_key(name_of(key), token)

    def admit(self, row: Row, path: str, model: str | None, now: datetime) -> None:
        """Check a known key in LiteLLM's order: blocked, model, expired, budget, route."""
        data_plane = _is_data_plane(path)
        if row.blocked and not (data_plane and self._in_tail(row.blocked_at, now)):
            raise refusals.blocked()
        if model is not None and not row.may_call(model):
            raise refusals.model_denied(model)
        if row.expires is not None and row.expires < now:
            ended, current = stamp(row.expires).replace("T", " "), stamp(now).replace("T", " ")
            raise refusals.expired(self.options.expired_status, row.key_name, ended, current)
        if data_plane and row.max_budget is not None and row.spend >= row.max_budget:
            label = f"{row.key_alias or 'key'} ({row.key_name})"
            raise refusals.over_budget(self.options.budget_status, label, row.spend, row.max_budget)
        if not row.may_visit(path):
            raise refusals.wrong_route(row.routes, path)

    def charge(self, row: Row, now: datetime) -> None:
        """Count one message against the key's rate and budget."""
        limit = self.options.rate if row.rpm_limit is None else row.rpm_limit
        minute = timedelta(minutes=1)
        start, count = row.minute or (now, 0)
        if now - start >= minute:
            start, count = now, 0
        if limit is not None and count >= limit:
            ends = start + minute
            wait = -((now - ends) // timedelta(seconds=1))
            text = f"{ends.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
            raise refusals.too_fast(row.token, limit, text, wait)
        row.minute = (start, count + 1)
        row.spend += self.options.message_cost

    def live(self, now: datetime) -> list[Row]:
        """Return the keys that would be accepted at this moment."""
        return [row for row in self._rows.values() if row.status(now) == "active"]

    def generate(self, body: Mapping[str, Any], now: datetime) -> Json:
        """Create a key; when its secret is already known, answer as if and change nothing."""
        asked = checked(body, _GENERATE)
        if "key_alias" in asked:
            self._check_alias(asked["key_alias"])
        if "key" in asked:
            self._check_custom_key(asked["key"])
        if "budget_duration" in asked:
            self._check_budget_duration(asked["budget_duration"], now)
        key: str = asked.get("key") or f"sk-{secrets.token_urlsafe(16)}"
        try:
            expires = end_of(asked["duration"], now) if "duration" in asked else None
        except ValueError as error:
            raise refusals.refusal(500, "internal_server_error", str(error)) from error
        requested = Row(
            token=token_of(key),
            key_name=name_of(key),
            key_alias=asked.get("key_alias"),
            expires=expires,
            models=asked.get("models", []),
            metadata=asked.get("metadata", {}),
            user_id=asked.get("user_id"),
            team_id=asked.get("team_id"),
            max_budget=asked.get("max_budget"),
            budget_duration=asked.get("budget_duration"),
            rpm_limit=asked.get("rpm_limit"),
            tpm_limit=asked.get("tpm_limit"),
            max_parallel_requests=asked.get("max_parallel_requests"),
            key_type=asked.get("key_type", "default"),
            created_at=stored(now),
            updated_at=stored(now),
        )
        kept = replace(requested, expires=stored(expires) if expires else None)
        kept = self._rows.setdefault(requested.token, kept)
        shown = replace(requested, created_at=kept.created_at, updated_at=kept.updated_at)
        extra = {"key": key, "token_id": requested.token, "duration": None}  # null there too
        return shown.printed(zulu=True) | extra

    def info(self, reference: str, caller: Row | None, now: datetime) -> Json:
        """Describe a live or archived key by secret or hash; without a caller it is the admin."""
        token = token_of(reference)
        row = self._rows.get(token) or self._archive.get(token)
        if row is None:
            raise refusals.not_found("Key not found in database")
        if caller is not None and caller.token != token and caller.user_id != row.user_id:
            said = "You are not allowed to access this key's info. Your role=internal_user"
            raise refusals.refusal(403, "internal_server_error", said)
        shown = row.printed()
        del shown["token"]
        return {"key": reference, "info": shown | {"status": row.status(now)}}

    def list_keys(self, query: Mapping[str, str], now: datetime) -> Json:
        """List keys, newest first, as hashes or as objects."""
        page, size = paging(query, 10)
        state = query.get("status")
        if state not in (None, "active", "expired", "revoked", "deleted"):
            said = "Invalid status value. Supported: 'active', 'expired', 'revoked', 'deleted'."
            raise refusals.internal(400, said, "None")
        alias, substring = query.get("key_alias"), flag(query, "substring_matching")
        found = [
            row
            for row in self._listed(now, archived=state == "deleted")
            if (state is None or row.status(now) == state)
            and query.get("key_hash") in (None, "", row.token)
            and query.get("user_id") in (None, "", row.user_id)
            and query.get("team_id") in (None, "", row.team_id)
            and (not alias or _matches(row, alias, substring))
        ]
        found.sort(key=lambda row: (row.created_at, row.token), reverse=True)
        full = flag(query, "return_full_object")
        shown = [row.printed(zulu=True) if full else row.token for row in _slice(found, page, size)]
        return {"keys": shown} | _counts(found, page, size)

    def list_aliases(self, query: Mapping[str, str], now: datetime) -> Json:
        """List the aliases in use that contain the search text."""
        page, size = paging(query, 50)
        search = query.get("search", "")
        found = sorted(
            row.key_alias
            for row in self._listed(now)
            if row.key_alias and _matches(row, search, substring=True)
        )
        return {
            "aliases": _slice(found, page, size),
            **_counts(found, page, size),
            "size": size,
        }

    def delete(self, body: Mapping[str, Any], now: datetime) -> Json:
        """Delete by key, hash or alias; one known is enough for all to be reported deleted."""
        asked = checked(body, {"keys": "list", "key_aliases": "list"})
        keys, aliases = asked.get("keys"), asked.get("key_aliases", ())
        if not keys and not aliases:
            said = "Value error, At least one of 'keys' or 'key_aliases' must be provided."
            raise invalid(("value_error", ["body"], said))
        tokens = {token_of(str(key)) for key in keys or ()}
        found = [
            row
            for row in self._rows.values()
            if (row.token in tokens if keys else row.key_alias in aliases)
        ]
        if not found:
            raise refusals.internal(404, "No keys found")
        for row in found:
            row.deleted_at = now
            self._archive[row.token] = self._rows.pop(row.token)
        return {"deleted_keys": keys or aliases}

    def update(self, body: Mapping[str, Any], now: datetime) -> Json:
        """Change a key in place; a duration counts from now, null or "-1" removes the end."""
        asked = checked(body, _UPDATE)
        if "key" not in asked and "key_alias" not in asked:
            said = "Value error, either key or key_alias must be provided"
            raise invalid(("value_error", ["body"], said))
        row = self._named(asked)
        if asked.get("key_alias", row.key_alias) != row.key_alias:
            self._check_alias(asked["key_alias"])
        duration = body.get("duration", "")
        if duration is None or duration == "-1":
            row.expires = None
        elif duration:
            try:
                row.expires = stored(end_of(duration, now))
            except ValueError as error:
                said = f"Authentication Error, {error}"
                raise refusals.refusal(400, "auth_error", said, "None") from error
        for name in asked.keys() - {"key", "duration"}:
            setattr(row, name, asked[name])
        row.updated_at = row.settings_updated_at = stored(now)
        return {"key": asked.get("key", row.token)} | row.printed()

    def block(self, body: Mapping[str, Any], blocked: bool, now: datetime) -> Json:
        """Block or unblock a key."""
        asked = checked(body, {"key": "string"})
        if "key" not in asked:
            raise invalid(("missing", ["body", "key"], "Field required"))
        if not _KEY_OR_HASH.fullmatch(asked["key"]):
            raise refusals.bad_request("Invalid key format.", "key")
        row = self._named(asked)
        row.blocked, row.blocked_at = blocked, now if blocked else None
        row.updated_at = row.settings_updated_at = stored(now)
        return row.printed(zulu=True)

    def _named(self, asked: Mapping[str, Any]) -> Row:
        if "key" in asked:
            row = self._rows.get(token_of(asked["key"]))
        else:
            alias = asked["key_alias"]
            row = next((row for row in self._rows.values() if row.key_alias == alias), None)
        if row is None:
            raise refusals.not_found("Key not found.")
        return row

    def _check_alias(self, alias: str) -> None:
        if ".." in alias or not alias.isprintable():
            raise refusals.bad_request("Invalid key_alias", "key_alias")
        taken = any(row.key_alias == alias for row in self._rows.values())
        if taken and self.options.unique_aliases:
            said = "Unique key aliases across all keys are required."
            message = f"Key with alias '{alias}' already exists. {said}"
            raise refusals.bad_request(message, "key_alias")

    def _check_custom_key(self, key: str) -> None:
        rule = "Invalid key format. LiteLLM Virtual Key must"
        if self.options.disable_custom_api_keys:
            said = "Custom API key values are disabled by your administrator."
            raise refusals.internal(403, f"{said} Keys must be auto-generated.")
        if not key.startswith("sk-"):
            raise refusals.internal(400, f"{rule} start with 'sk-'. Received: {masked(key)}")
        if len(key) < MINIMUM_KEY_LENGTH:
            said = f"{rule} be at least {MINIMUM_KEY_LENGTH} characters long."
            raise refusals.internal(400, said)

    def _check_budget_duration(self, text: str, now: datetime) -> None:
        try:
            end_of(text, now)
        except ValueError as error:
            said = f"Invalid budget_duration '{text}'."
            formats = "Use a format like '1h', '24h', '7d', or '30d'."
            raise refusals.internal(400, f"{said} {formats}") from error

    def _listed(self, now: datetime, archived: bool = False) -> list[Row]:
        lag = timedelta(seconds=self.options.list_lag)
        rows = self._archive if archived else self._rows
        return [row for row in rows.values() if now - row.created_at >= lag]

    def _in_tail(self, ended: datetime | None, now: datetime) -> bool:
        tail = timedelta(seconds=self.options.cache_tail)
        return ended is not None and now - ended < tail


def _is_data_plane(path: str) -> bool:
    return path.startswith("/v1/")


def _matches(row: Row, text: str, substring: bool) -> bool:
    alias = row.key_alias or ""
    return text.lower() in alias.lower() if substring else text == alias


def _slice(found: Sequence[Any], page: int, size: int) -> Sequence[Any]:
    return found[(page - 1) * size : page * size]


def _counts(found: Sequence[Any], page: int, size: int) -> Json:
    pages = -(-len(found) // size)
    return {"total_count": len(found), "current_page": page, "total_pages": pages}
