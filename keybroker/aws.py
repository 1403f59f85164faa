"""Which account of AWS, and as whom: the `[aws]` table.

No secret is in it: who we are is found where AWS's own programs find it, or a login says it. What
the table leaves out is taken from the variables that these read.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from keybroker.credential import Reference, sha256
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.fields import (
    AWS_ARN,
    AWS_ROLE,
    LOGIN,
    LOGIN_REFERENCE,
    TEXT,
    Field,
    read_table_of,
)
from keybroker.values import dataclass, replace

PLACE = {
    "profile": Field(TEXT, "The profile in ~/.aws/config; AWS_PROFILE when absent."),
    "region": Field(TEXT, "The region; AWS_REGION, or the profile's, when absent."),
    "login": Field(
        LOGIN,
        "The login of type aws-sso that the profile signs in by; the one of its sso_session when "
        "absent.",
    ),
    "role_arn": Field(AWS_ROLE, "In place of a profile: the role that web_identity gives."),
    "web_identity": Field(LOGIN_REFERENCE, "The login whose token AWS takes for that role."),
}
_VARIABLES = {
    "profile": ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
MOST_SIGN_INS = 50  # files that are looked at
SIGN_INS = "~/.aws/sso/cache"  # where AWS's own programs keep what a sign-in gave
LARGEST_FILE = 1 << 18
MOST_HOPS = 5  # from a profile to the one that it begins with
_SERVICES = ("SECRETS_MANAGER", "STS", "SSO", "SSO_OIDC", "SIGNIN")
# What botocore's chain of credentials and its clients read.
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCOUNT_ID"),
    *(name for names in _VARIABLES.values() for name in names),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CREDENTIAL_EXPIRATION"),
    *("AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    *("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
    *("AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_V1_DISABLED"),
    *("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"),
    *("AWS_METADATA_SERVICE_TIMEOUT", "AWS_METADATA_SERVICE_NUM_ATTEMPTS"),
    *("AWS_STS_REGIONAL_ENDPOINTS", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"),
    *("AWS_CA_BUNDLE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_LOGIN_CACHE_DIRECTORY"),
    *("AWS_ENDPOINT_URL", *(f"AWS_ENDPOINT_URL_{service}" for service in _SERVICES)),
)


@dataclass(frozen=True, slots=True)
class Account:
    """
    An account by the profile that leads to it, None is AWS's own default; or by a role.

    Attributes:
        login: The sign-in that the profile needs, if it is known to be one of ours.
        role_arn: The role that a token of `web_identity` gives; both or none.
    """

    profile: str | None
    region: str | None
    login: Reference | None = None
    role_arn: str | None = None
    web_identity: Reference | None = None

    @property
    def text(self) -> str:
        """The table as JSON, always the same for the same table."""
        given: dict[str, Any] = {name: getattr(self, name) for name in PLACE}
        given["login"] = None if self.login is None else self.login.value
        web_identity = self.web_identity
        given["web_identity"] = None if web_identity is None else {"login": web_identity.value}
        return json.dumps({name: one for name, one in given.items() if one}, sort_keys=True)

    @property
    def who(self) -> str:
        """As whom it is asked, in a word; empty for AWS's own default."""
        role = None if self.role_arn is None else self.role_arn.partition(":role/")[2]
        return role or self.profile or ""

    def __str__(self) -> str:
        kind = "profile" if self.role_arn is None else "role"
        named = f"{kind} {self.who}" if self.who else "the default profile"
        return named if self.region is None else f"{named}, {self.region}"


def session_of(text: str) -> str:
    """Return the name of what is kept of an account's credentials: they serve all regions."""
    account = read_text(text)
    if account.web_identity is not None:
        return sha256(f"aws {account.role_arn} {account.web_identity}".encode())[:16]
    return sha256(f"aws {account.profile or ''}".encode())[:16]


def account_of(secret: str, account: Account) -> Account:
    """Return the account to ask for a secret: an ARN says its region."""
    arn = AWS_ARN.match(secret)
    return account if arn is None else replace(account, region=arn[1])


def read_account(raw: Mapping[str, Any], path: tuple[str, ...], where: Where) -> Account:
    """
    Read the keys of an `[aws]` table; any others are not looked at.

    Raises:
        ConfigError: A wrong value, or some that do not go together.
    """
    mine = {name: value for name, value in raw.items() if name in PLACE}
    values = read_table_of(mine, PLACE, path, where)
    if (values["role_arn"] is None) != (values["web_identity"] is None):
        raise where.error(path, "role_arn and web_identity belong together")
    if values["role_arn"] is not None and (values["profile"] or values["login"]):
        problem = "is in place of a profile, and of its sign-in; take one of them out"
        raise where.error((*path, "role_arn"), problem)
    return Account(**values)


def read_text(text: str) -> Account:
    """
    Read a table that the journal kept.

    Raises:
        ConfigError: It cannot be read by this version.
    """
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        raise ConfigError("journal: aws: cannot be read by this version")
    return read_account(raw, ("aws",), Where({}, "journal"))


def with_variables(raw: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """
    Fill in what a table leaves out.

    Raises:
        ConfigError: A variable that is needed cannot be used; it is named.
    """
    filled = dict(raw)
    for name, variables in _VARIABLES.items():
        found = next((one for one in variables if environment.get(one)), None)
        if name in filled or found is None or (name == "profile" and "role_arn" in filled):
            continue
        try:
            filled[name] = PLACE[name].kind.read(environment[found])
        except ValueError as error:
            raise ConfigError(f"{found}: {error}") from None
    return filled


def files(environment: Mapping[str, str]) -> list[str]:
    """Return what AWS's own programs write when somebody configures them or signs in."""
    home = "~/.aws"
    folders = [
        os.path.join(home, "sso", "cache"),
        environment.get("AWS_LOGIN_CACHE_DIRECTORY") or os.path.join(home, "login", "cache"),
    ]
    identity = environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")
    return [
        *([identity] if identity else []),
        environment.get("AWS_CONFIG_FILE") or os.path.join(home, "config"),
        environment.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.join(home, "credentials"),
        *folders,  # their times change when what is in them is replaced
        *(file for folder in folders for file in _within(folder)),  # or is written over
    ]


def _within(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(os.path.expanduser(folder)))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names[:MOST_SIGN_INS] if name.endswith(".json")]


def with_login(
    raw: Mapping[str, Any], sign_ins: Mapping[str, str], environment: Mapping[str, str]
) -> Mapping[str, Any]:
    """
    Fill in the sign-in that a table's profile needs, where it is one of ours.

    Args:
        sign_ins: The logins' tables as JSON, by session or start page.
    """
    if not sign_ins or "login" in raw or "role_arn" in raw:
        return raw
    found = sign_ins.get(_signs_in_by(raw.get("profile") or "default", environment))
    return raw if found is None else {**raw, "login": found}


def _signs_in_by(profile: str, environment: Mapping[str, str]) -> str:
    """Return the session or the start page of a profile's sign-in; empty where it has none."""
    from configparser import Error, RawConfigParser  # nobody else needs it

    read = RawConfigParser(default_section="", strict=False)
    file = environment.get("AWS_CONFIG_FILE") or os.path.join("~", ".aws", "config")
    try:
        read.read(os.path.expanduser(file))
    except (Error, OSError, UnicodeDecodeError):  # who needs it will say so
        return ""
    for _ in range(MOST_HOPS):
        section = "default" if profile == "default" else f"profile {profile}"
        if not read.has_section(section):
            section = f'profile "{profile}"'
        found: Mapping[str, str] = read[section] if read.has_section(section) else {}
        by = found.get("sso_session") or found.get("sso_start_url")
        if by or "source_profile" not in found:
            return by or ""
        profile = found["source_profile"]
    return ""


def sign_in_file(name: str) -> str:
    """Return where AWS's programs keep what a sign-in gave, by its session or start page."""
    try:
        from _sha1 import sha1  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from hashlib import sha1
    digest = sha1(name.encode(), usedforsecurity=False).hexdigest()
    return os.path.join(os.path.expanduser(SIGN_INS), f"{digest}.json")


def read_sign_in(name: str) -> dict[str, Any] | None:
    """Read what AWS's programs keep of a sign-in; None where there is none."""
    try:
        with open(sign_in_file(name), "rb") as file:
            found = json.loads(file.read(LARGEST_FILE))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("accessToken") else None
