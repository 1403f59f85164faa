"""LiteLLM's key API: keys that we choose, named by a label, known by their SHA-256.

See: https://docs.litellm.ai/docs/proxy/virtual_keys. Status and type of every error were read off
a running proxy (1.106): a 500 can be final (duration, licence), a 401 can mean "no right".
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.config import Profile
from keybroker.credential import Credential, Issuer, Lease, Look, Secret, Verdict, sha256
from keybroker.errors import (
    LoginNeeded,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.journal import read_time
from keybroker.rotation import Kind
from keybroker.sources import Capabilities, reference
from keybroker.sources.gateway import Gateway
from keybroker.sources.http import Http, Reply

PASSED_ON = (
    "max_budget",
    "budget_duration",
    "rpm_limit",
    "tpm_limit",
    "max_parallel_requests",
    "user_id",
    "team_id",
)
PAGE = 100
MOST_PAGES = 100
NO_KEYS = re.compile(r"no keys found|key not found", re.I)
FINAL_500 = re.compile(r"invalid duration|enterprise feature", re.I)
NO_RIGHT = re.compile(r"only proxy admin|does not have permissions|not in your team", re.I)
ROLES = ("internal_user_viewer", "proxy_admin_viewer")  # who may look, and make nothing


class LiteLLM:
    """
    Mints at `POST /key/generate`. Creates are one a label and one at a time (the owner lock):
    the proxy's own check that an alias is unique lets concurrent ones through.
    """

    capabilities = Capabilities(Kind.MINTED, find=True, revoke=True, enforces_expiry=True)

    def __init__(
        self,
        issuer: Issuer,
        environment: Mapping[str, str],
        profile: Profile | None = None,
        seconds: float = 8.0,
        vault: reference.Reader | None = None,
        anew: Callable[[], Secret] | None = None,
    ) -> None:
        self._issuer = issuer
        self._environment = environment
        self._profile = profile
        self._vault = vault
        self._anew = anew
        self._http = Http("litellm", issuer.url, ca=issuer.ca, seconds=seconds)
        self._gateway = Gateway.of(profile, self._info) if profile is not None else None

    @classmethod
    def of(
        cls,
        profile: Profile,
        environment: Mapping[str, str],
        vault: reference.Reader | None = None,
        anew: Callable[[], Secret] | None = None,
    ) -> "LiteLLM":
        """
        Return the source of a profile.

        Args:
            vault: Reads a reference that leads elsewhere.
            anew: Has the token of a login renewed though it seemed to be good; None: it is a key.
        """
        seconds = profile.source["timeout"].total_seconds()
        return cls(profile.issuer, environment, profile, seconds, vault, anew)

    @classmethod
    def by(
        cls,
        issuer: Issuer,
        environment: Mapping[str, str],
        seconds: float = 8.0,
        vault: reference.Reader | None = None,
        anew: Callable[[], Secret] | None = None,
    ) -> "LiteLLM":
        """Return one that can find and revoke, from the journal's record alone."""
        return cls(issuer, environment, seconds=seconds, vault=vault, anew=anew)

    def issue(self, label: str) -> Credential:
        """Mint a key. It is asked for once: after a time-out the label is looked up instead."""
        assert self._profile is not None
        lifetime: timedelta = self._profile.source["lifetime"]
        secret = Secret(f"sk-{secrets.token_urlsafe(32)}")
        wish = self._wish(label, lifetime)
        reply = self._call("POST", "/key/generate", body={**wish, "key": secret.reveal()})
        if reply.status == 403 and "custom api key" in _message(reply).lower():
            # the administrator has keys made by the proxy alone; nothing was committed
            reply = self._call("POST", "/key/generate", body=wish)
            secret = _made_by_proxy(reply) if reply.status == 200 else secret
        self._check(reply, "mint a key", mints=True)
        value = reply.value
        if not isinstance(value, dict) or value.get("key") != secret.reveal():
            raise SourceInvalid(
                f"litellm: {self._http.host} answers 200, but not with the key that was asked for",
                hint="is this address a LiteLLM proxy? see source.url",
                unknown=True,
            )
        ends = reply.asked_at + lifetime
        if isinstance(value.get("expires"), str):
            try:
                ends = min(ends, read_time(value["expires"]) - reply.skew)
            except ValueError:
                raise SourceInvalid("litellm: its expiry cannot be read", unknown=True) from None
        lease = Lease(_id(secret), "litellm", reply.asked_at, ends, revocable=True)
        return Credential(secret, lease)

    def look(self, known: Lease) -> Lease | None:
        return None

    def renew(self, lease: Lease) -> Lease:
        raise SourceDenied("litellm: its keys are not renewed")

    def revoke(self, lease: Lease) -> None:
        """Delete by hash. Only the proxy's own words count as "not found", not a bare 404."""
        reply = self._call("POST", "/key/delete", body={"keys": [lease.id]})
        if reply.status == 404 and NO_KEYS.search(_message(reply)):
            return
        self._check(reply, "revoke a key")
        deleted = reply.value.get("deleted_keys") if isinstance(reply.value, dict) else None
        if not isinstance(deleted, list) or lease.id not in deleted:
            raise SourceInvalid(f"litellm: {self._http.host} did not confirm that a key is deleted")

    def find(self, label: str) -> Sequence[Lease]:
        """List by alias; names are compared here, since some versions search for parts."""
        return [lease for found, lease in self._list(label, parts=False) if found == label]

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        return [pair for pair in self._list(prefix, parts=True) if pair[0].startswith(prefix)]

    def verify(self, secret: Secret) -> Verdict:
        assert self._gateway is not None
        return self._gateway.verify(secret)

    def close(self) -> None:
        self._http.close()
        if self._gateway is not None:
            self._gateway.close()

    def _wish(self, label: str, lifetime: timedelta) -> dict[str, Any]:
        assert self._profile is not None
        source = self._profile.source
        wish: dict[str, Any] = {
            "key_alias": label,
            "duration": f"{lifetime // timedelta(seconds=1)}s",
            "key_type": source["key_type"],
            "metadata": {**source["metadata"], "keybroker": label},
        }
        if source["models"]:
            wish["models"] = list(source["models"])
        wish.update({name: source[name] for name in PASSED_ON if source[name] is not None})
        return wish

    def _list(self, alias: str, *, parts: bool) -> list[tuple[str, Lease]]:
        found = []
        for page in range(1, MOST_PAGES + 1):
            query = {
                "key_alias": alias,
                "return_full_object": "true",
                "include_created_by_keys": "true",
                "include_team_keys": "true",
                "page": str(page),
                "size": str(PAGE),
            }
            if parts:
                query["substring_matching"] = "true"
            reply = self._call("GET", "/key/list", query=query)
            self._check(reply, "list keys")
            rows = reply.value.get("keys") if isinstance(reply.value, dict) else None
            if not isinstance(rows, list):
                raise SourceInvalid(
                    f"litellm: {self._http.host} answers with no list of keys",
                    hint="is this address a LiteLLM proxy? see source.url",
                )
            found += [_row(row, reply.asked_at) for row in rows if isinstance(row, dict)]
            if len(rows) < PAGE:
                return [pair for pair in found if pair is not None]
        raise SourceInvalid(f"litellm: {self._http.host} lists more keys than can be read")

    def _info(self, secret: Secret) -> Verdict:
        """Ask the key API about a key."""
        try:
            reply = self._call("GET", "/key/info", query={"key": _id(secret)})
        except SourceError as error:
            return Verdict(Look.UNDECIDED, "info", error.message.removeprefix("litellm: "))
        if reply.status == 404 and NO_KEYS.search(_message(reply)):
            return Verdict(Look.REFUSED, "info", "404 unknown key")
        info = reply.value.get("info") if isinstance(reply.value, dict) else None
        if reply.status != 200 or not isinstance(info, dict):
            return Verdict(Look.UNDECIDED, "info", f"{reply.status} error")
        ended = info.get("status") in ("deleted", "expired", "revoked")
        if ended or info.get("blocked") is True or _is_over(info.get("expires"), reply):
            return Verdict(Look.REFUSED, "info", "the key API says that it is gone")
        return Verdict(Look.ALIVE, "info", "200")

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Reply:
        assert self._issuer.admin is not None

        def ask(token: Secret) -> Reply:
            headers = {"authorization": f"Bearer {token.reveal()}"}
            return self._http.call(method, path, query=query, headers=headers, body=body)

        admin = reference.resolve(self._issuer.admin, self._environment, self._vault)
        reply = ask(admin)
        if reply.status == 401 and self._anew is not None and not NO_RIGHT.search(_message(reply)):
            newer = self._anew()  # nothing was done yet
            if newer.fingerprint != admin.fingerprint:
                reply = ask(newer)
        return reply

    def _check(self, reply: Reply, doing: str, *, mints: bool = False) -> None:
        """Raise what an error answer means. A 5xx after a mint may have been committed."""
        status, message = reply.status, _message(reply)
        who = f"litellm: {self._http.host}"
        if status == 200:
            return
        if status in (401, 403) and self._anew is not None:
            raise self._denied_to_a_person(status, message, doing)
        if status in (401, 403):
            if "only proxy admin" in message.lower() or status == 403:
                raise SourceDenied(
                    f"{who} says that the admin key has no right to {doing} ({status})",
                    hint="see source.admin, user_id and team_id",
                )
            raise SourceDenied(
                f"{who} refused the admin key ({status})",
                hint=f"see source.admin ({self._issuer.admin})",
            )
        if status == 400 and ("already exists" in message or _param(reply) == "key_alias"):
            raise SourceInvalid(f"{who} already has a key of this label", unknown=mints)
        if status in (400, 404, 405, 422) or (status == 500 and FINAL_500.search(message)):
            reason = _reason(message)
            raise SourceInvalid(
                f"{who} will not {doing} ({status}{reason})",
                hint="see lifetime, models and limits of the source"
                if mints and status != 404
                else "is this address a LiteLLM proxy? see source.url",
            )
        if status == 429:
            raise SourceUnavailable(
                f"{who} asks to wait (429)", retry_after=reply.retry_after or timedelta(seconds=5)
            )
        # Its own envelope says that the proxy is done with the call; a 502 or 504 of something
        # in between does not.
        over = status in (500, 503) and _is_the_proxy_s_own(reply)
        raise SourceUnavailable(
            f"{who} failed to {doing} ({status})",
            retry_after=reply.retry_after,
            unknown=mints,
            over=over,
        )

    def _denied_to_a_person(self, status: int, message: str, doing: str) -> SourceDenied:
        """Return what somebody has to do who signed in, or an administrator for them."""
        who, name = f"litellm: {self._http.host}", str(self._issuer.admin).partition(":")[2]
        if "only proxy admin" in message.lower():
            role = next((one for one in ROLES if f"role={one}" in message), "too small for it")
            return SourceDenied(
                f"{who} does not let you {doing}: your role there is {role} ({status})",
                hint="an administrator makes you internal_user; for all who come, with "
                "default_internal_user_params: {user_role: internal_user}",
            )
        if "create keys for themselves" in message:
            return SourceDenied(
                f"{who} lets you {doing} for yourself alone ({status})",
                hint="take out source.user_id",
            )
        if NO_RIGHT.search(message):
            return SourceDenied(
                f"{who} does not let you {doing} for this team ({status})",
                hint="take out source.team_id, or an administrator lets the team's members do it: "
                "/key/generate and /key/delete",
            )
        if status == 403:
            return SourceDenied(f"{who} does not let you {doing} ({status})")
        return LoginNeeded(
            f"login {name}: {self._http.host} does not take its token any more ({status})",
            hint=f"run: keybroker login {name}",
        )


def _id(secret: Secret) -> str:
    return sha256(secret.reveal().encode())


def _row(row: Mapping[str, Any], now: datetime) -> tuple[str, Lease] | None:
    alias, token = row.get("key_alias"), row.get("token")
    if not isinstance(alias, str) or not isinstance(token, str):
        return None
    ends: datetime | None = None
    try:
        issued = read_time(row["created_at"])
        ends = read_time(row["expires"]) if isinstance(row.get("expires"), str) else None
    except (KeyError, ValueError, TypeError):
        issued = now.astimezone(UTC)
    return alias, Lease(token, "litellm", issued, ends, revocable=True)


def _is_over(expires: object, reply: Reply) -> bool:
    """Tell whether an end has passed; versions before `status` leave that to the reader."""
    try:
        return read_time(expires) <= reply.asked_at + reply.skew
    except (ValueError, TypeError):  # it has none
        return False


def _made_by_proxy(reply: Reply) -> Secret:
    value = reply.value.get("key") if isinstance(reply.value, dict) else None
    try:
        return Secret(value if isinstance(value, str) else "")
    except ValueError as error:
        raise SourceInvalid(f"litellm: the key it made is {error}", unknown=True) from None


def _message(reply: Reply) -> str:
    """Return the error's text, for comparison only: it may hold a key."""
    value = reply.value if isinstance(reply.value, dict) else {}
    problem = value.get("error", value.get("detail"))
    if isinstance(problem, dict):
        problem = problem.get("message", problem.get("error"))
    return problem if isinstance(problem, str) else ""


def _is_the_proxy_s_own(reply: Reply) -> bool:
    """Tell LiteLLM's error envelope, which repeats the status as text, from another's."""
    problem = reply.value.get("error") if isinstance(reply.value, dict) else None
    return isinstance(problem, dict) and problem.get("code") == str(reply.status)


def _param(reply: Reply) -> str:
    problem = reply.value.get("error") if isinstance(reply.value, dict) else None
    return str(problem.get("param")) if isinstance(problem, dict) else ""


def _reason(message: str) -> str:
    """Say in words of our own what the proxy objects to, where that is known."""
    for words, ours in (
        ("over max limit", "over the proxy's upper bound"),
        ("invalid duration", "it does not know the duration"),
        ("enterprise", "it needs a licence"),
        ("model", "about a model"),
        ("user", "about the user"),
        ("team", "about the team"),
        ("budget", "about a budget"),
    ):
        if words in message.lower():
            return f": {ours}"
    return ""
