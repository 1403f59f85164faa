"""Who signs a person or a machine in: the `[logins.NAME]` tables, and how long a sign-in lasts.

No secret is in a table: what a client needs beside its id is a reference. What a sign-in gave is
in a file of its own, sealed but for its header, which says who and until when.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keybroker import aws
from keybroker.credential import Issuer, Reference, fingerprint, sha256
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.fields import GITHUB, NAME, read_table_of, unknown
from keybroker.values import dataclass, field, replace
from keybroker.vault import check_place

FOLDER = "logins"  # in the state directory
SIGNED_OUT = "it was signed out"
VERSION = 1  # of a file in it
LARGEST_FILE = 1 << 18
LOCK_SECONDS = 6.0  # for another process to be done with a sign-in
# keys of a table that say nothing of who signs in to what
BESIDE = ("warn", "lasts", "timeout", "ca", "port", "redirect", "client_secret")
GITHUB_VARIABLES = ("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
AWS_VARIABLES = (
    *("AWS_CONFIG_FILE", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SSO"),
    *("AWS_ENDPOINT_URL_SSO_OIDC", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
    *("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"),
)
TABLES_OF_TEXTS = ("metadata", "headers", "parameters")  # in which `login` is any word


@dataclass(frozen=True, slots=True)
class SignIn:
    """
    One `[logins.NAME]` table: a provider and what to ask it for.

    `raw` is the table as it was written, in values that JSON knows.
    """

    name: str
    type: str
    settings: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """Name and table as JSON, always the same for the same: what a reference carries."""
        return json.dumps({"name": self.name, **self.raw}, sort_keys=True, separators=(",", ":"))

    @property
    def mark(self) -> str:
        """What tells this table from another: a sign-in by another is none by this one."""
        counts = {key: value for key, value in self.raw.items() if key not in BESIDE}
        return sha256(json.dumps([self.name, counts], sort_keys=True).encode())[:16]

    @property
    def issuer(self) -> Issuer:
        """The provider, as something that is asked."""
        return Issuer("login", "", Reference("login", self.text))

    @property
    def seconds(self) -> float:
        """How long it may take to have its token: another's turn, then ours."""
        found: float = LOCK_SECONDS + self.settings["timeout"].total_seconds()
        return found

    @property
    def unattended(self) -> bool:
        """Whether nobody has to sign in: a machine does by itself."""
        return self.type == "workload"

    @property
    def at_aws(self) -> str | None:
        """By what AWS's own programs know it, who keep what it gives: a session, a start page."""
        if self.type != "aws-sso":
            return None
        return str(self.settings["session"] or self.settings["start_url"])

    @property
    def is_sealed(self) -> bool:
        """Whether there has to be something to seal with what it gives."""
        return not self.unattended and self.at_aws is None

    @property
    def variables(self) -> set[str]:
        """The variables of the environment that it needs."""
        names = set(self._named("env"))
        if self.settings.get("jwt") == GITHUB:
            names.update(GITHUB_VARIABLES)
        if self.at_aws is not None:
            names.update(AWS_VARIABLES)
        return names

    @property
    def files(self) -> list[str]:
        """The files that it reads: another content may do better."""
        key = self.settings.get("private_key")
        return [*self._named("file"), *([] if key is None else [key])]

    def _named(self, kind: str) -> list[str]:
        found = [one for one in self.settings.values() if isinstance(one, Reference)]
        return [str(one.value) for one in found if one.kind == kind]


def read_login(
    name: str, raw: Mapping[str, Any], where: Where, path: tuple[str, ...] = ()
) -> SignIn:
    """
    Read one table.

    Raises:
        ConfigError: An unknown type or key, a wrong value, or one that is missing.
    """
    from keybroker import login_types  # most daemons have no use for it

    path = path or ("logins", name)
    if not NAME.fullmatch(name):
        problem = "a login's name has lower-case letters, digits, - and _, at most 32"
        raise where.error(path, problem)
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in login_types.LOGINS:
        raise where.error(
            (*path, "type"), f"expected one of {', '.join(sorted(login_types.LOGINS))}"
        )
    rest = {key: value for key, value in raw.items() if key != "type"}
    settings = read_table_of(rest, login_types.LOGINS[kind], path, where)
    for key, problem in login_types.contradictions(kind, settings):
        raise where.error((*path, key), problem)
    if kind == "vault":
        check_place(settings, path, where)
    return SignIn(name, kind, settings, raw)


def read_text(text: str) -> SignIn:
    """
    Read what a reference carries.

    Raises:
        ConfigError: It cannot be read by this version.
    """
    try:
        raw = json.loads(text)
        name = raw.pop("name")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError("login: cannot be read by this version") from None
    return read_login(str(name), raw, Where({}, "journal"))


def expanded(value: Any, logins: Mapping[str, SignIn], path: tuple[str, ...], where: Where) -> Any:
    """
    Put the tables of logins in the place of their names, wherever a table names one.

    Raises:
        ConfigError: There is no login of that name, or it is of no use there.
    """
    if not isinstance(value, dict):
        return value
    found = {}
    for key, one in value.items():
        if key in TABLES_OF_TEXTS:
            found[key] = one
        elif key == "login" and isinstance(one, str):
            if one not in logins:
                raise where.error((*path, key), unknown_login(one, list(logins)))
            if problem := _unfit(logins[one].type, path[-1], value.get("type", value.get("to"))):
                raise where.error((*path, key), problem)
            found[key] = logins[one].text
        else:
            found[key] = expanded(one, logins, (*path, key), where)
    return found


def _unfit(kind: str, place: str, of: object) -> str:
    """
    Say why a type of login is of no use in a table; nothing where it is.

    Args:
        place: The table's name.
        of: What type it says it is.
    """
    at_aws = place == "aws" or of == "aws"
    if kind == "vault" and place != "token":
        return 'a login of type vault is for [vault.auth]: method = "token"'
    if kind != "vault" and place == "token":
        return 'expected a login of type vault; the token of another is for method = "jwt"'
    if kind == "openrouter" and of == "litellm":
        return 'a key of OpenRouter\'s makes no keys at LiteLLM: it is for type = "login"'
    if kind == "aws-sso" and not at_aws:
        return "a login of type aws-sso is for [aws]"
    if kind != "aws-sso" and at_aws:
        return "expected a login of type aws-sso; the token of another is for web_identity"
    return ""


def needed_by(issuer: Issuer) -> Iterator[SignIn]:
    """
    Yield the sign-ins that an issuer is asked with.

    One of the journal's that this version cannot read is left out: whoever asks with it says so.
    """
    for text in _texts(issuer):
        with suppress(ConfigError):
            yield read_text(text)


def _texts(issuer: Issuer) -> Iterator[str]:
    if issuer.admin is not None and issuer.admin.kind == "login":
        yield str(issuer.admin.value)
    if '"login"' in issuer.vault:
        for one in json.loads(issuer.vault).get("auth", {}).values():
            if isinstance(one, dict) and "login" in one:
                yield one["login"]
    if '"login"' in issuer.aws:
        account = aws.read_text(issuer.aws)
        for reference in (account.login, account.web_identity):
            if reference is not None:
                yield str(reference.value)


# how a sign-in stands, as its file's header says


@dataclass(frozen=True, slots=True)
class Standing:
    """
    What may be said of a sign-in. Times are aware, in UTC.

    Attributes:
        mark: Of the table that it was made by.
        who: The person or the machine, as the provider calls them; empty where it does not say.
        since: When they signed in.
        refreshed_at: When its token was last replaced.
        access_ends: When that token ends; None: no end is known.
        ends_at: When they have to sign in again; None where nobody says.
        renewable: A new token is had without them.
        ended: Why it is over; empty while it is not.
    """

    name: str
    type: str
    mark: str
    who: str
    since: datetime
    refreshed_at: datetime
    access_ends: datetime | None = None
    ends_at: datetime | None = None
    renewable: bool = False
    ended: str = ""

    def over(self, now: datetime) -> bool:
        """Say whether nothing can be had with it any more."""
        if self.ended or (self.ends_at is not None and now >= self.ends_at):
            return True
        return not self.renewable and self.access_ends is not None and now >= self.access_ends

    @property
    def lasts_until(self) -> datetime | None:
        """When a person has to sign in again, as far as that is known."""
        return self.ends_at if self.renewable else self.access_ends


_TIMES = ("since", "refreshed_at", "access_ends", "ends_at")
_TEXTS = ("name", "type", "mark", "who", "ended")


def encode_standing(standing: Standing) -> dict[str, Any]:
    """Return a standing as its header has it."""
    values: dict[str, Any] = {name: getattr(standing, name) for name in _TEXTS}
    for name in _TIMES:
        if (moment := getattr(standing, name)) is not None:
            values[name] = moment.isoformat()
    return {**values, "renewable": standing.renewable}


def decode_standing(found: Mapping[str, Any]) -> Standing:
    """Read a standing back; ValueError, KeyError or TypeError when it is none."""
    times: dict[str, Any] = {n: datetime.fromisoformat(found[n]) for n in _TIMES if n in found}
    if any(moment.tzinfo is None for moment in times.values()):
        raise ValueError
    values: dict[str, Any] = {name: str(found[name]) for name in _TEXTS}
    return Standing(**values, **times, renewable=found["renewable"] is True)


def file_of(state: Path, name: str) -> Path:
    return state / FOLDER / f"{name}.json"


def standing_of(state: Path, sign_in: SignIn) -> Standing | None:
    """Return how the sign-in by a table stands; None where there is none, or none by this one."""
    found: Mapping[str, Any] = {}
    standing = None
    try:
        with open(file_of(state, sign_in.name), "rb", opener=_no_follow) as file:
            found = json.loads(file.read(LARGEST_FILE))
        standing = decode_standing(found["standing"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if standing is None or standing.mark != sign_in.mark:
        standing = None
    if sign_in.at_aws is not None:
        return _standing_at_aws(sign_in, standing, str(found.get("client")))
    return standing


def _standing_at_aws(sign_in: SignIn, ours: Standing | None, client: str) -> Standing | None:
    """
    Return how a sign-in stands that AWS's own programs keep, renew, begin and end as well.

    Args:
        ours: How it was when we began it, by a client; of another it says nothing.
    """
    assert sign_in.at_aws is not None
    found = aws.read_sign_in(sign_in.at_aws)
    try:
        if found is None:
            return None
        access_ends = _moment(found["expiresAt"])
        registered = _moment(found.get("registrationExpiresAt", found["expiresAt"]))
        written = datetime.fromtimestamp(os.path.getmtime(aws.sign_in_file(sign_in.at_aws)), UTC)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    renewable = bool(found.get("refreshToken")) and registered > datetime.now(UTC)
    if ours is None or client != client_of(found):
        ours = Standing(sign_in.name, sign_in.type, sign_in.mark, "", written, written)
    return replace(ours, refreshed_at=written, access_ends=access_ends, renewable=renewable)


def client_of(found: Mapping[str, Any]) -> str:
    """Tell one sign-in at AWS from another: each of ours is by a client of its own."""
    return fingerprint(str(found.get("clientId")))


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text.replace("UTC", "+00:00"))
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def one_named(name: str, known: Mapping[str, SignIn]) -> SignIn:
    """
    Return the login of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in known:
        hint = None if known else "see docs/login.md for what to write"
        raise ConfigError(f"config: {unknown_login(name, list(known))}", hint=hint)
    return known[name]


def unknown_login(name: str, known: list[str]) -> str:
    if not known:
        return "there is no [logins.NAME] table"
    said = unknown(name, known).removeprefix("unknown key").lstrip("; ")
    return f"no login {name!r}" + (f"; {said}" if said else f"; logins: {', '.join(known)}")
