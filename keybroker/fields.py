"""The kinds of value that a configuration file holds: how each is read, shown and described.

A kind reads one TOML value or raises ValueError with what was expected; the caller adds file,
line and key. No message repeats the value: it may be a key that somebody pasted.
"""

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from keybroker.credential import Reference
from keybroker.document import Where
from keybroker.values import dataclass

UNITS = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}
GATEWAY, SERVER, SOCKET = (
    '"https://llm.example.com"',
    '"https://vault.example.com:8200"',
    '"unix:/run/vault/agent.sock"',
)
TABLES = (
    "defaults",
    "cache",
    "vault",
    "aws",
    "logins",
    "hooks",
    "service",
    "profiles",
)  # at the top of a file, and nowhere else
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")  # of a profile, of a login
GITHUB = "github-actions"  # whose jobs get a JWT from a server
LOCAL = ("env", "file", "keyring", "command", "credential")  # what is read on this machine
SIGNED_IN = (*LOCAL, "login")
REFERENCES = (*SIGNED_IN, "vault", "aws")
VAULT_PATH = re.compile(r"(?!/|v1/)[!-\"$-.0->@-~]+(?:/[!-\"$-.0->@-~]+)+")  # no #, ?, empty part
VAULT_NAME = re.compile(r"/?[!-\"$-.0->@-~]+(?:/[!-\"$-.0->@-~]+)*/?")
VAULT_REFERENCE = re.compile(rf"{VAULT_PATH.pattern}#[!-~]+")
POINTER_TEXT = re.compile(r"(?:/(?:[^~/]|~[01])+)+")  # RFC 6901; an empty name is nobody's field
AWS_NAME = re.compile(r"[A-Za-z0-9/_+=.@!-]{1,512}")
AWS_ARN = re.compile(
    r"arn:aws[a-z-]*:secretsmanager:([a-z0-9-]+):[0-9]{12}:secret:[A-Za-z0-9/_+=.@!-]{1,512}"
)
AWS_ROLE_ARN = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[!-~]{1,512}")
AWS_SECRET = re.compile(rf"(?:{AWS_ARN.pattern}|{AWS_NAME.pattern})")
AWS_REFERENCE = re.compile(rf"{AWS_SECRET.pattern}(?:#{POINTER_TEXT.pattern})?")


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of value is read, and its JSON Schema."""

    read: Callable[[Any], Any]
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a table."""

    kind: Kind
    doc: str
    default: Any = None
    required: bool = False
    example: str = ""


def read_duration(value: Any) -> timedelta:
    """Read `90s`, `1.5h`, `250ms`: a number and one of ms, s, m, h, d."""
    match = re.fullmatch(
        r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)", value if _text(value) else ""
    )
    if match is None:
        raise ValueError('expected a duration such as "90s", "15m" or "12h"')
    length = float(match[1]) * UNITS[match[2]]
    if not timedelta(0) < length <= timedelta(days=3650):
        raise ValueError("expected a duration above zero and of at most ten years")
    return length


def show_duration(length: timedelta) -> str:
    """Write a duration as the file has it, in the largest unit that divides it."""
    for unit, one in reversed(UNITS.items()):
        if length % one == timedelta(0) and length // one < 10**9:
            return f"{length // one}{unit}"
    return f"{length.total_seconds():.6f}".rstrip("0") + "s"


def read_url(value: Any, example: str = GATEWAY) -> str:
    """Read an http or https address with a host; a user name or a password in it is refused."""
    problem = f"expected an address such as {example}"
    if not _text(value) or any(not "!" <= c <= "~" for c in value):
        raise ValueError(problem)
    try:
        parts = urlsplit(value)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError(problem) from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{problem}: it must begin with https:// or http://")
    if not parts.hostname or not port_is_valid:
        raise ValueError(problem)
    if parts.username is not None or parts.password is not None:
        raise ValueError("an address must not hold a user name or a password")
    if parts.query or parts.fragment:
        raise ValueError("an address must not hold ? or #")
    return str(value).rstrip("/")


def read_address(value: Any) -> str:
    """Read an address, or the socket of an agent: unix:/run/vault/agent.sock."""
    if not _text(value) or not value.startswith("unix:"):
        found = read_url(value, f"{SERVER} or {SOCKET}")
        if found.endswith("/v1"):
            raise ValueError("expected an address without /v1 after it")
        return found
    path = value.removeprefix("unix:").removeprefix("//")
    if not path.startswith("/") or not all("!" <= c <= "~" for c in path):
        raise ValueError(f"expected a path after unix:, such as {SOCKET}")
    return f"unix:{path}"


def read_reference(value: Any, allowed: tuple[str, ...] = REFERENCES) -> Reference:
    """Read where a secret is. Text is refused: it would be the secret itself."""
    kinds = ", ".join(allowed)
    if not isinstance(value, dict):
        raise ValueError(
            f'expected a reference such as {{ keyring = "name" }} ({kinds}), never a key itself'
        )
    if len(value) != 1 or (kind := next(iter(value))) not in allowed:
        raise ValueError(f"expected exactly one of {kinds}")
    found = value[kind]
    if kind == "command":
        return Reference(kind, read_command(found))
    if not _text(found):
        raise ValueError(f"expected text after {kind}")
    if looks_like_key(found) or (kind == "env" and not re.fullmatch(r"[A-Za-z_]\w*", found, re.A)):
        raise ValueError(
            f"expected the name after {kind} of what holds the key, never a key itself"
        )
    if kind == "file" and not found.startswith(("/", "~/")):
        raise ValueError('expected a path that begins with "/" or "~/"')
    if kind == "credential" and not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,63}", found, re.A):
        raise ValueError("expected the name of a credential of systemd's: letters, digits, . _ -")
    if kind == "vault" and not VAULT_REFERENCE.fullmatch(found):
        raise ValueError('expected a path and a field after vault: "secret/data/llm/admin#key"')
    if kind == "aws" and not AWS_REFERENCE.fullmatch(found):
        raise ValueError(
            'expected a name or an ARN after aws, and a field if it is JSON: "llm/admin#/key"'
        )
    return Reference(kind, found)


def read_local_reference(value: Any) -> Reference:
    """Read a reference to what is on this machine."""
    return read_reference(value, LOCAL)


def read_signed_in_reference(value: Any) -> Reference:
    """Read a reference to what is on this machine, or to the token of a login."""
    return read_reference(value, SIGNED_IN)


def read_login_name(value: Any) -> Reference:
    """Read the name of a login, or its table where the name was replaced by it already."""
    if not _text(value):
        raise ValueError('expected the name of a [logins.NAME] table, such as "corp"')
    return Reference("login", str(value))


def read_signed_in(value: Any) -> Reference:
    """Read a reference to the token of a login."""
    return read_reference(value, ("login",))


def read_aws_role(value: Any) -> str:
    """Read the ARN of a role of AWS's."""
    if not _text(value) or not AWS_ROLE_ARN.fullmatch(value):
        raise ValueError('expected the ARN of a role, such as "arn:aws:iam::123456789012:role/llm"')
    return str(value)


def read_vault_path(value: Any) -> str:
    """Read a path of Vault's API, without the /v1/ before it."""
    if not _text(value) or not VAULT_PATH.fullmatch(value):
        raise ValueError('expected a path such as "secret/data/llm/key", without /v1/ before it')
    return str(value)


def read_vault_name(value: Any) -> str:
    """Read a mount or a namespace; `bao auth list` shows them with a slash behind."""
    if not _text(value) or not VAULT_NAME.fullmatch(value):
        raise ValueError("expected a name such as eng or eng/tools, in printable ASCII")
    return str(value).strip("/")


def read_aws_secret(value: Any) -> str:
    """Read the name or the ARN of a secret of AWS's."""
    if not _text(value) or looks_like_key(value) or not AWS_SECRET.fullmatch(value):
        raise ValueError('expected the name or the ARN of a secret, such as "llm/key"')
    return str(value)


def read_pointer(value: Any) -> str:
    """Read a JSON Pointer, which names a field. See: https://www.rfc-editor.org/rfc/rfc6901"""
    if not _text(value) or not POINTER_TEXT.fullmatch(value):
        raise ValueError('expected a JSON pointer such as "/key" or "/gateway/key"')
    return str(value)


def read_text_or_reference(value: Any) -> "str | Reference":
    """Read what is no secret, or where it is."""
    return read_local_reference(value) if isinstance(value, dict) else read_text(value)


def read_command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(_text(part) for part in value):
        raise ValueError('expected a program and its arguments: ["prog", "argument"]')
    return tuple(value)


def read_text(value: Any) -> str:
    if not _text(value):
        raise ValueError("expected text")
    return str(value)


def read_path(value: Any) -> str:
    if not _text(value) or not value.startswith("/"):
        raise ValueError('expected a path that begins with "/"')
    return str(value)


def read_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def read_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected a whole number above zero")
    return value


def read_amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ValueError("expected a number above zero")
    return float(value)


def read_texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(_text(part) for part in value):
        raise ValueError('expected a list of texts: ["one", "two"]')
    return tuple(value)


def read_table(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(_text(part) for part in value.values()):
        raise ValueError('expected a table of texts: { name = "value" }')
    if any(looks_like_key(part) for part in value.values()):
        raise ValueError("a value looks like a key; this file holds no secret")
    return dict(value)


def read_headers(value: Any) -> dict[str, str]:
    """Read extra headers. Those that carry a credential are refused: this file holds no secret."""
    headers = read_table(value)
    for name, text in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError("a header's name has a character that HTTP does not allow")
        if not text.isascii() or not text.isprintable():
            raise ValueError("the value of a header is not printable ASCII")
        if looks_like_key(text):
            raise ValueError("the value of a header looks like a key; this file holds no secret")
        if name.lower() in ("authorization", "x-api-key", "cookie", "proxy-authorization"):
            raise ValueError(f"header {name} would carry a secret; the source sends it itself")
    return headers


def looks_like_key(text: str) -> bool:
    """Say whether somebody pasted a key where its place belongs."""
    return text.startswith(("sk-", "Bearer "))


def read_table_of(
    raw: Mapping[str, Any], fields: Mapping[str, Field], path: tuple[str, ...], where: Where
) -> dict[str, Any]:
    """
    Read a table by its fields, with their defaults.

    Raises:
        ConfigError: An unknown key, a wrong value, or one that is required and missing.
    """
    for name in raw:
        if name not in fields:
            raise where.error((*path, name), unknown(name, list(fields)))
    values = {}
    for name, one in fields.items():
        if name in raw:
            try:
                values[name] = one.kind.read(raw[name])
            except ValueError as error:
                raise where.error((*path, name), str(error)) from None
        elif one.required:
            what = f": {one.doc[0].lower()}{one.doc[1:]}"
            if one.example:
                what = f", such as {name} = {one.example}"
            raise where.error(path, f"has no {name}{what}")
        else:
            values[name] = one.default
    return values


def unknown(name: str, allowed: list[str]) -> str:
    """Say that a key is unknown, and which one may have been meant."""
    from difflib import get_close_matches

    if name in TABLES:  # `cache.key = …` below the header of another table
        return f"{name} is a table of its own: [{name}]"
    close = get_close_matches(name, allowed, 1)
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key"


def one_of(*words: str) -> Kind:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return str(value)

    return Kind(read, {"type": "string", "enum": list(words)})


def _text(value: object) -> bool:
    return isinstance(value, str) and value != "" and "\x00" not in value


VAULT_API_PATH = Kind(read_vault_path, {"type": "string", "pattern": f"^{VAULT_PATH.pattern}$"})
MOUNT = Kind(read_vault_name, {"type": "string", "pattern": f"^{VAULT_NAME.pattern}$"})
AWS_SECRET_ID = Kind(read_aws_secret, {"type": "string", "pattern": f"^{AWS_SECRET.pattern}$"})
POINTER = Kind(read_pointer, {"type": "string", "pattern": f"^{POINTER_TEXT.pattern}$"})
TEXT = Kind(read_text, {"type": "string", "minLength": 1})
PATH = Kind(read_path, {"type": "string", "pattern": "^/"})
TEXTS = Kind(read_texts, {"type": "array", "items": {"type": "string", "minLength": 1}})
TABLE = Kind(read_table, {"type": "object", "additionalProperties": TEXT.schema})
HEADERS = Kind(read_headers, {"type": "object", "additionalProperties": TEXT.schema})
BOOLEAN = Kind(read_boolean, {"type": "boolean"})
COUNT = Kind(read_count, {"type": "integer", "minimum": 1})
AMOUNT = Kind(read_amount, {"type": "number", "exclusiveMinimum": 0})
URL = Kind(read_url, {"type": "string", "pattern": "^https?://[^/?#@]+(/[^?#]*)?$"})
DURATION = Kind(read_duration, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)$"})
COMMAND = Kind(read_command, {**TEXTS.schema, "minItems": 1})
ADDRESS = Kind(
    read_address, {"type": "string", "pattern": "^(https?://[^/?#@]+(/[^?#]*)?|unix:(//)?/.+)$"}
)
ADDRESSES = Kind(
    lambda value: tuple(read_url(one, SERVER) for one in read_texts(value)),
    {"type": "array", "items": URL.schema},
)


def _reference_schema(kinds: tuple[str, ...]) -> dict[str, Any]:
    special = {
        "command": COMMAND.schema,
        "vault": {"type": "string", "pattern": f"^{VAULT_REFERENCE.pattern}$"},
        "aws": {"type": "string", "pattern": f"^{AWS_REFERENCE.pattern}$"},
    }
    return {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {kind: special.get(kind, TEXT.schema) for kind in kinds},
    }


REFERENCE = Kind(read_reference, _reference_schema(REFERENCES))
LOCAL_REFERENCE = Kind(read_local_reference, _reference_schema(LOCAL))
SIGNED_IN_REFERENCE = Kind(read_signed_in_reference, _reference_schema(SIGNED_IN))
LOGIN_REFERENCE = Kind(read_signed_in, _reference_schema(("login",)))
AWS_ROLE = Kind(read_aws_role, {"type": "string", "pattern": f"^{AWS_ROLE_ARN.pattern}$"})
LOGIN = Kind(read_login_name, {"type": "string", "pattern": f"^{NAME.pattern}$"})
TEXT_OR_REFERENCE = Kind(read_text_or_reference, {"oneOf": [TEXT.schema, LOCAL_REFERENCE.schema]})
