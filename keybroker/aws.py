"""Which account of AWS, and as whom: the `[aws]` table.

No secret is in it: who we are is found where AWS's own programs find it. What the table leaves
out is taken from the variables that these read.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from keybroker.credential import sha256
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.fields import AWS_ARN, TEXT, Field, read_table_of
from keybroker.values import dataclass

PLACE = {
    "profile": Field(TEXT, "The profile in ~/.aws/config; AWS_PROFILE when absent."),
    "region": Field(TEXT, "The region; AWS_REGION, or the profile's, when absent."),
}
_VARIABLES = {
    "profile": ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
MOST_SIGN_INS = 50  # files that are looked at
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
    """An account by the profile that leads to it; None is AWS's own default."""

    profile: str | None
    region: str | None

    @property
    def text(self) -> str:
        """The table as JSON, always the same for the same table."""
        given = {"profile": self.profile, "region": self.region}
        return json.dumps({name: one for name, one in given.items() if one}, sort_keys=True)

    def __str__(self) -> str:
        profile = "the default profile" if self.profile is None else f"profile {self.profile}"
        return profile if self.region is None else f"{profile}, {self.region}"


def session_of(text: str) -> str:
    """Return the name of what is kept of an account's credentials: they serve all regions."""
    return sha256(f"aws {read_text(text).profile or ''}".encode())[:16]


def account_of(secret: str, account: Account) -> Account:
    """Return the account to ask for a secret: an ARN says its region."""
    arn = AWS_ARN.match(secret)
    return account if arn is None else Account(account.profile, arn[1])


def read_account(raw: Mapping[str, Any], path: tuple[str, ...], where: Where) -> Account:
    """
    Read the keys of an `[aws]` table; any others are not looked at.

    Raises:
        ConfigError: A wrong value.
    """
    mine = {name: value for name, value in raw.items() if name in PLACE}
    return Account(**read_table_of(mine, PLACE, path, where))


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
        if name in filled or found is None:
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
