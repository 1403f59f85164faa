"""One Vault with a way in: what stands at its paths, and why there is nothing.

See: https://developer.hashicorp.com/vault/api-docs/secret/kv
"""

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from keybroker.credential import Reference, Secret
from keybroker.errors import SourceError, SourceInvalid
from keybroker.journal import read_time
from keybroker.sources.held import Held
from keybroker.sources.http import Reply
from keybroker.sources.vault.login import Login
from keybroker.sources.vault.server import Server, part, said
from keybroker.values import replace
from keybroker.vault import Vault

PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,19}")  # no key looks like it
WRONG_KIND = "invalid path for a versioned k/v"
NOT_SOON = timedelta(hours=1)
GONE = re.compile(r"lease not found|invalid lease|no lease entry")


class Place:
    """One Vault, with a way in."""

    def __init__(
        self,
        vault: Vault,
        environment: Mapping[str, str],
        held: Held,
        seconds: float,
        *,
        ends: bool = False,
    ) -> None:
        self.server = Server(vault, seconds)
        self.login = Login(vault, self.server, environment, held, ends=ends)
        self.who = f"vault: {self.server.host}"

    def read(self, path: str, version: int | None = None) -> Reply:
        """Read a path, whatever is mounted there."""
        query = {} if version is None else {"version": str(version)}
        return self.login.ask(
            lambda client: client.adapter.get(f"/v1/{path}", params=query), path, "read"
        )

    def invalid(
        self, path: str, words: str, hint: str | None = None, *, withdrawn: bool = False
    ) -> SourceInvalid:
        message = f"{self.who}: {path}: {words}"[:200]
        return SourceInvalid(message, hint=hint, withdrawn=withdrawn)

    def nothing(self, path: str, reply: Reply, version: int | None = None) -> SourceInvalid:
        """Return the error for an answer that is no data."""
        withdrawn = reply.status == 404 and not said(reply)
        return self.invalid(path, *_why_nothing(path, reply, version), withdrawn=withdrawn)

    def table(self, path: str, reply: Reply, version: int | None = None) -> Mapping[str, Any]:
        """
        Return the data of a secret of either kind of KV.

        Raises:
            SourceInvalid: There is none.
        """
        data = part(reply, "data")
        if is_versioned(data):
            inner, meta = data["data"], data["metadata"]
            if inner is None:
                raise self.invalid(path, *_end_of_version(meta), withdrawn=True)
            return inner if isinstance(inner, dict) else {}
        if reply.status != 200:
            raise self.nothing(path, reply, version)
        return data

    def secret(
        self, path: str, field: str, data: Mapping[str, Any], *, named_by: str = "field"
    ) -> Secret:
        """
        Return what is in a field.

        Args:
            named_by: What of the configuration has the field's name.

        Raises:
            SourceInvalid: It is not there, or no key.
        """
        if field not in data:
            there = sorted(name for name in data if PLAIN_NAME.fullmatch(name))[:5]
            hint = f"it has {', '.join(there)}; see {named_by}" if there else f"see {named_by}"
            raise self.invalid(path, f"has no field {field}", hint)
        if not isinstance(data[field], str):
            raise self.invalid(path, f"field {field} is no text")
        try:
            return Secret(data[field].rstrip("\r\n"))  # which `echo` leaves there
        except ValueError as error:
            hint = f"write it without blanks: bao kv patch … {field}=-"
            raise self.invalid(path, f"field {field} is {error}", hint) from None

    def revoke(self, lease_id: str) -> None:
        """
        End a lease, and return when it has ended; one that is over is a success.

        Raises:
            SourceError: It was not confirmed.
        """
        path = "sys/leases/revoke"
        body = {"lease_id": lease_id, "sync": True}
        reply = self.login.ask(lambda client: client.write_data(path, data=body), path, "update")
        if reply.status >= 300 and not GONE.search(said(reply)):
            raise self.invalid(path, f"did not end a lease ({reply.status})")

    def refused(self, path: str, lease_id: str, hint: str) -> SourceInvalid:
        """Give back a lease that nobody asked for; return the error that says why."""
        error = self.invalid(path, "is made anew for each reader", hint)
        error.retry_after = NOT_SOON  # each further look may leave another one behind
        self.give_back(lease_id, error)
        return error

    def give_back(self, lease_id: str, error: SourceError) -> None:
        """Give back a lease that is of no use; where that fails, it may be alive."""
        self.server.begin()
        try:
            self.revoke(lease_id)
        except SourceError:
            error.unknown = error.over = True
            error.message = f"{error.message}; its lease lives on"[:200]


def keep_session(vault: Vault, environment: Mapping[str, str], held: Held, seconds: float) -> None:
    """
    Renew a session that is due; it is kept for those who ask seldom.

    Raises:
        SourceError, ConfigError: As `Login.session`.
    """
    place = Place(vault, environment, held, seconds)
    try:
        place.login.session()
    finally:
        place.server.close()


def end_session(vault: Vault, environment: Mapping[str, str], held: Held, seconds: float) -> None:
    """
    Have the token of a session ended, and all that was leased with it.

    Raises:
        SourceError: Vault did not confirm it; the session is not used any more here.
    """
    session = held.get(vault.session)
    if session.secret is None:
        return
    held.put(replace(session, secret=None))
    place = Place(vault, environment, held, seconds)
    try:
        reply = place.server.ask(lambda client: client.auth.token.revoke_self(), session.secret)
        if reply.status >= 300 and "invalid token" not in said(reply):  # it is over already
            words = f"did not end the token ({reply.status}), which may live on until its end"
            raise place.invalid("auth/token/revoke-self", words, "its policy has to allow that")
    finally:
        place.server.close()


def read_reference(
    reference: Reference,
    vault: Vault,
    environment: Mapping[str, str],
    held: Held,
    seconds: float = 8.0,
    *,
    ends: bool = False,
) -> Secret:
    """
    Read the secret that `path#field` names.

    Args:
        ends: It is to end what was made with it; see `Login`.

    Raises:
        SourceError: Vault could not be asked, forbids it, or has no such secret.
        ConfigError: What a login needs is not there.
    """
    path, _, field = str(reference.value).partition("#")
    place = Place(vault, environment, held, seconds, ends=ends)
    try:
        reply = place.read(path)
        if lease := lease_id(reply):
            error = place.refused(path, lease, "name a secret of KV; only those can be read so")
            error.unknown = error.over = False  # the gateway was not asked
            raise error
        data = place.table(path, reply)
        return place.secret(path, field, data, named_by="the part after #")
    finally:
        place.server.close()


def lease_id(reply: Reply) -> str | None:
    """Return the name of the lease that an answer came with."""
    found = reply.value.get("lease_id") if isinstance(reply.value, dict) else None
    return found if isinstance(found, str) and found else None


def is_versioned(data: Mapping[str, Any]) -> bool:
    """Tell an answer of KV 2 from a secret of KV 1."""
    return isinstance(data.get("metadata"), dict) and "data" in data


def _end_of_version(meta: Mapping[str, Any]) -> tuple[str, str]:
    """Say what became of a version whose data are gone."""
    version = meta.get("version")
    which = f"version {version}" if isinstance(version, int) else "its version"
    if meta.get("destroyed") is True:
        return f"{which} was destroyed", "write a new version"
    try:
        when = f" on {day(read_time(meta.get('deletion_time')))}"
    except (ValueError, TypeError, OverflowError):
        when = ""
    return f"{which} was deleted{when}", "write a new version, or undelete it"


def _why_nothing(path: str, reply: Reply, version: int | None) -> tuple[str, str]:
    """Say why there is nothing at a path, and what to type."""
    text = said(reply)
    if WRONG_KIND in text:
        mount, _, rest = path.partition("/")
        return "is a path of KV 1, and what is mounted there is KV 2", f"path = {mount}/data/{rest}"
    if "namespace not found" in text:
        return "there is no such namespace", "see namespace"
    if "no handler for route" in text or "unsupported path" in text:
        return "nothing is mounted there", "see path; bao secrets list shows what there is"
    if "unknown role" in text or "failed to find entry for connection" in text:
        return "has no such role, or no connection for it", "see path, and the engine's roles"
    if reply.status == 404 and version is not None:
        return f"there is no version {version}", "see version; or leave it out, for the newest"
    if reply.status == 404:
        return "there is nothing at this path", "see path"
    if reply.status == 405:
        return "cannot be read so (405)", "see path, engine and parameters"
    return f"will not be read ({reply.status})", "try it by hand: bao read …"


def day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}Z"
