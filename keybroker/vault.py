"""Which Vault or OpenBao, and how to log in there: the `[vault]` table.

No secret is in it: what a login needs is a reference. What the table leaves out is taken from the
variables that Vault's and OpenBao's own programs read.
"""

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from keybroker import aws
from keybroker.credential import Reference, sha256
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.fields import (
    ADDRESS,
    ADDRESSES,
    BOOLEAN,
    LOCAL_REFERENCE,
    MOUNT,
    PATH,
    SIGNED_IN_REFERENCE,
    TEXT,
    TEXT_OR_REFERENCE,
    Field,
    read_table_of,
)
from keybroker.values import dataclass, field

KUBERNETES_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105
PLACE = {
    "address": Field(ADDRESS, "The server, or an agent's unix:/path; VAULT_ADDR when absent."),
    "nodes": Field(
        ADDRESSES,
        "Further servers of the same cluster: asked when the first is not there, and the only "
        "ones that a redirect may lead to.",
        default=(),
    ),
    "namespace": Field(MOUNT, "The namespace of path and login; VAULT_NAMESPACE when absent."),
    "ca": Field(PATH, "A PEM file of the authorities of its certificate; VAULT_CACERT."),
    "client_cert": Field(PATH, "A PEM file of our certificate; VAULT_CLIENT_CERT when absent."),
    "client_key": Field(PATH, "A PEM file of its key; VAULT_CLIENT_KEY when absent."),
}
AUTH: dict[str, dict[str, Field]] = {
    "token": {
        "token": Field(SIGNED_IN_REFERENCE, "Where a token is.", required=True),
        "renew": Field(BOOLEAN, "Renew it while that works.", default=True),
    },
    "approle": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="approle"),
        "role_id": Field(TEXT_OR_REFERENCE, "The role_id, or where it is.", required=True),
        "secret_id": Field(LOCAL_REFERENCE, "Where the secret_id is, if the role wants one."),
        "wrapped_by": Field(
            TEXT,
            "The secret_id is a wrapping token that must have been made at this path, such as "
            "auth/approle/role/keybroker/secret-id.",
        ),
    },
    "jwt": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="jwt"),
        "role": Field(TEXT, "The role; the method's default one when absent."),
        "jwt": Field(
            SIGNED_IN_REFERENCE, "Where the token is; read for each login.", required=True
        ),
    },
    "kubernetes": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="kubernetes"),
        "role": Field(TEXT, "The role.", required=True),
        "token_path": Field(
            PATH,
            "The service account's token, read anew for each login.",
            default=KUBERNETES_TOKEN,
        ),
    },
    "cert": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="cert"),
        "name": Field(TEXT, "The role; the server finds one that fits when absent."),
    },
    "userpass": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="userpass"),
        "username": Field(TEXT, "The user's name.", required=True),
        "password": Field(LOCAL_REFERENCE, "Where the password is.", required=True),
    },
    "ldap": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="ldap"),
        "username": Field(TEXT, "The user's name.", required=True),
        "password": Field(LOCAL_REFERENCE, "Where the password is.", required=True),
    },
    "aws": {
        "mount": Field(MOUNT, "Where the method is mounted.", default="aws"),
        "role": Field(TEXT, "The role; the one of the identity's name when absent."),
        "region": Field(TEXT, "Whose STS signs.", default="us-east-1"),
        "server_id": Field(TEXT, "What X-Vault-AWS-IAM-Server-ID has to be, where it is checked."),
    },
    "agent": {},
}
PASSWORDS = frozenset({"userpass", "ldap"})  # a few wrong ones lock the user
_VARIABLES = {
    "address": ("BAO_ADDR", "VAULT_ADDR"),
    "namespace": ("BAO_NAMESPACE", "VAULT_NAMESPACE"),
    "ca": ("BAO_CACERT", "VAULT_CACERT"),
    "client_cert": ("BAO_CLIENT_CERT", "VAULT_CLIENT_CERT"),
    "client_key": ("BAO_CLIENT_KEY", "VAULT_CLIENT_KEY"),
}
VARIABLES = tuple(name for names in _VARIABLES.values() for name in names)


@dataclass(frozen=True, slots=True)
class Vault:
    """
    A server and a way to log in.

    `auth` has the settings of `method`; `raw` is the table as it was written, in values that JSON
    knows.
    """

    address: str
    nodes: tuple[str, ...]
    namespace: str | None
    ca: str | None
    client_cert: str | None
    client_key: str | None
    method: str
    auth: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The table as JSON, always the same for the same table: what the journal keeps."""
        return json.dumps(self.raw, sort_keys=True, separators=(",", ":"))

    @property
    def session(self) -> str:
        """The name of its session: another table is another session."""
        return session_of(self.text)


def session_of(text: str) -> str:
    """Return the name of the session of a table as JSON."""
    return sha256(text.encode())[:16]


def logs_in(text: str) -> bool:
    """Say whether a table as JSON begins a session, rather than to be given a token."""
    return read_text(text).method not in ("token", "agent")


def read_vault(raw: Mapping[str, Any], path: tuple[str, ...], where: Where) -> Vault:
    """
    Read the keys of a `[vault]` table; any others are not looked at.

    Raises:
        ConfigError: A wrong value, an unknown method, or what a method needs is missing.
    """
    mine = {name: value for name, value in raw.items() if name in (*PLACE, "auth")}
    values = read_table_of({k: v for k, v in mine.items() if k != "auth"}, PLACE, path, where)
    check_place(values, path, where)
    auth = mine.get("auth")
    if not isinstance(auth, dict):
        problem = "has no auth table that says how to log in to Vault; see docs/vault.md"
        raise where.error((*path, "auth") if "auth" in mine else path, problem)
    method = auth.get("method")
    if not isinstance(method, str) or method not in AUTH:
        raise where.error((*path, "auth", "method"), f"expected one of {', '.join(AUTH)}")
    rest = {name: value for name, value in auth.items() if name != "method"}
    settings = read_table_of(rest, AUTH[method], (*path, "auth"), where)
    if method == "cert" and values["client_cert"] is None:
        raise where.error((*path, "auth", "method"), "cert needs client_cert and client_key")
    if method == "approle" and settings["wrapped_by"] and settings["secret_id"] is None:
        raise where.error((*path, "auth", "wrapped_by"), "there is no secret_id to unwrap")
    return Vault(**values, method=method, auth=settings, raw=mine)


def check_place(values: Mapping[str, Any], path: tuple[str, ...], where: Where) -> None:
    """
    Refuse a server that cannot be asked.

    Raises:
        ConfigError: It has no address, or half of what our certificate is.
    """
    if values["address"] is None:
        problem = "has no address of a Vault: set address in [vault], or the variable VAULT_ADDR"
        raise where.error(path, problem)
    if (values["client_cert"] is None) != (values["client_key"] is None):
        raise where.error(path, "client_cert and client_key belong together")


def read_text(text: str) -> Vault:
    """
    Read a table that the journal kept.

    Raises:
        ConfigError: It cannot be read by this version.
    """
    try:
        raw = json.loads(text)
    except ValueError:
        raw = {}
    return read_vault(raw if isinstance(raw, dict) else {}, ("vault",), Where({}, "journal"))


def with_variables(raw: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """
    Fill in what a table leaves out.

    Raises:
        ConfigError: A variable that is needed cannot be used; it is named.
    """
    filled = dict(raw)
    for name, variables in _VARIABLES.items():
        if name in filled:
            continue
        for variable in variables:
            if value := environment.get(variable, ""):
                if name not in ("address", "namespace"):
                    value = os.path.abspath(value)
                try:
                    PLACE[name].kind.read(value)
                except ValueError as error:
                    raise ConfigError(f"{variable}: {error}") from None
                filled[name] = value.strip("/") if name == "namespace" else value
                break
    return filled


def variables(text: str) -> set[str]:
    """
    Return the variables of the environment that a login by a table as JSON needs.

    None of one that this version cannot read: who needs it will say so.
    """
    try:
        vault = read_text(text)
    except ConfigError:
        return set()
    names = {str(one.value) for one in _references(vault) if one.kind == "env"}
    return names.union(aws.VARIABLES) if vault.method == "aws" else names


def files(text: str) -> list[str]:
    """Return the files that a login by a table as JSON reads: another content may do better."""
    vault = read_text(text)
    found = [str(one.value) for one in _references(vault) if one.kind == "file"]
    found += [vault.auth["token_path"]] if vault.method == "kubernetes" else []
    return found + [one for one in (vault.client_cert, vault.client_key) if one is not None]


def _references(vault: Vault) -> list[Reference]:
    return [one for one in vault.auth.values() if isinstance(one, Reference)]


def host_of(address: str) -> str:
    """Return what an error calls a server."""
    return address if address.startswith("unix:") else urlsplit(address).netloc
