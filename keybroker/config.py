"""The configuration file: its shape, its defaults, its errors with file and line.

No secret is in it; a secret is a reference. Unknown keys are errors, because a misspelt
`lifetime` must not become a key that lives for ever.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keybroker import aws
from keybroker.credential import Issuer, Reference
from keybroker.document import WHOLE, Where, read
from keybroker.errors import ConfigError
from keybroker.fields import (
    AMOUNT,
    AWS_SECRET_ID,
    BOOLEAN,
    COMMAND,
    COUNT,
    DURATION,
    GATEWAY,
    HEADERS,
    LOGIN,
    NAME,
    PATH,
    POINTER,
    REFERENCE,
    TABLE,
    TABLES,
    TEXT,
    TEXTS,
    URL,
    VAULT_API_PATH,
    Field,
    one_of,
    read_table_of,
    show_duration,
    unknown,
)
from keybroker.label import is_made
from keybroker.rotation import RETRY_MAX, Kind, Policy, default_hold, shortest_lifetime
from keybroker.signin import SignIn, expanded, needed_by, read_login
from keybroker.values import dataclass, field, replace
from keybroker.vault import PLACE, Vault, read_vault, with_variables

# How long a lease whose answer was lost may live: longer ones are not taken; or what Vault itself
# allows where nobody said less.
LONGEST_LEASE, LONGEST_ORPHAN = timedelta(hours=24), timedelta(hours=768)
SMALLEST_WINDOW = 100_000  # tokens; see https://code.claude.com/docs/en/llm-gateway-connect
NO_VAULT = "there is no [vault] table that says how to log in to Vault; see docs/vault.md"
ENDED = "was made for one program, and is not handed out any more"

GENERAL = {
    "default": Field(TEXT, "The profile that is meant when none is named."),
}
CACHE = {
    "key": Field(
        one_of("auto", "keyring", "file", "memory"),
        "What seals the cache: a systemd credential or the OS keyring (auto), the keyring alone, "
        "a key file of mode 0600, or nothing, so that no key outlives its process.",
        default="auto",
    ),
}
HOOKS = {
    "login_ending": Field(COMMAND, "Told ahead of the end of a sign-in, and at its end."),
}
SERVICE = {
    "writable": Field(
        TEXTS,
        "Folders that programs of yours write into, which `keybroker service install` opens for "
        "the daemon.",
        default=(),
    ),
}
PROFILE = {
    "base_url": Field(
        URL,
        "Becomes ANTHROPIC_BASE_URL; any path in it is kept.",
        required=True,
        example=GATEWAY,
    ),
    "helper_ttl": Field(
        DURATION, "How often Claude Code asks again.", default=timedelta(seconds=60)
    ),
    "hold": Field(
        DURATION,
        "How long a reader may keep a key; the default is the longer of 15m and "
        "3 x helper_ttl + 10m.",
    ),
    "verify": Field(
        one_of("auto", "models", "count_tokens", "info", "message", "none"),
        "How a new key is tried before it is handed out; message costs one token.",
        default="auto",
    ),
    "verify_model": Field(
        TEXT, "The model that count_tokens and message name.", default="claude-sonnet-4-5"
    ),
    "headers": Field(HEADERS, "Sent with every look at base_url.", default={}),
    "ca": Field(PATH, "A PEM file of the authorities that the gateway's certificate is from."),
    "anthropic_key": Field(
        BOOLEAN, "Let a key that begins with sk-ant- go to this base_url.", default=False
    ),
    "push": Field(
        BOOLEAN,
        "Touch the settings files that running sessions watch when the key was replaced.",
        default=True,
    ),
    "users": Field(
        TEXTS,
        "Who is answered by the daemon of a shared host, besides root: names of users.",
        default=(),
    ),
    "max_live": Field(COUNT, "The most unrevoked keys at one gateway.", default=4),
    "openai_base_url": Field(
        URL, "The same gateway for programs that speak OpenAI's API; base_url with /v1 when absent."
    ),
    "export": Field(
        one_of("none", "file", "paste"),
        "For programs that run no helper: keep the key in a file of mode 0600 as well, or note "
        "that a person pastes it.",
        default="none",
    ),
}
CLAUDE = {
    "haiku": Field(TEXT, "The model of the haiku tier: ANTHROPIC_DEFAULT_HAIKU_MODEL."),
    "sonnet": Field(TEXT, "The model of the sonnet tier: ANTHROPIC_DEFAULT_SONNET_MODEL."),
    "opus": Field(TEXT, "The model of the opus tier: ANTHROPIC_DEFAULT_OPUS_MODEL."),
    "discovery": Field(
        BOOLEAN,
        "Let /model list the gateway's models that begin with claude or anthropic.",
        default=False,
    ),
    "auto_compact_window": Field(
        COUNT, "Tokens after which a session is compacted; below 100000 counts as 100000."
    ),
    "max_output_tokens": Field(COUNT, "The most tokens of one answer."),
    "disable_experimental_betas": Field(
        BOOLEAN,
        "Send no fields that upstreams refuse as unknown, such as context_management.",
        default=False,
    ),
    "disable_adaptive_thinking": Field(
        BOOLEAN,
        "For upstreams that refuse adaptive thinking; Opus 4.6 and Sonnet 4.6 only.",
        default=False,
    ),
    "disable_nonessential_traffic": Field(
        BOOLEAN, "No telemetry, no error reports, no updates.", default=False
    ),
    "bedrock_url": Field(URL, "The gateway in Bedrock's format; base_url when absent."),
    "vertex_url": Field(URL, "The gateway in Vertex AI's format; base_url when absent."),
    "vertex_project": Field(TEXT, "The project that Vertex AI's format names."),
    "vertex_region": Field(TEXT, "The region that Vertex AI's format names."),
    "foundry_url": Field(URL, "The gateway as Microsoft Foundry; base_url when absent."),
    "aws_url": Field(URL, "The gateway as Claude Platform on AWS; base_url when absent."),
    "aws_workspace": Field(TEXT, "The workspace at Claude Platform on AWS."),
}
SOURCES: dict[str, dict[str, Field]] = {
    "litellm": {
        "admin": Field(REFERENCE, "Where the key with key-management rights is."),
        "login": Field(LOGIN, "In place of it: the login whose person mints keys of their own."),
        "url": Field(URL, "The key API, where it is not at the origin of base_url."),
        "lifetime": Field(DURATION, "How long a minted key lives.", default=timedelta(hours=12)),
        "timeout": Field(DURATION, "The longest one call takes.", default=timedelta(seconds=8)),
        "models": Field(TEXTS, "The models that a key may use; all when absent.", default=()),
        "key_type": Field(one_of("llm_api", "default"), "What a key may call.", default="llm_api"),
        "max_budget": Field(AMOUNT, "Spend limit of one key; starts anew at each rotation."),
        "budget_duration": Field(TEXT, "When a key's budget is reset, such as 24h."),
        "rpm_limit": Field(COUNT, "Requests a minute."),
        "tpm_limit": Field(COUNT, "Tokens a minute."),
        "max_parallel_requests": Field(COUNT, "Requests at a time."),
        "user_id": Field(TEXT, "The user who owns the keys."),
        "team_id": Field(TEXT, "The team that owns the keys."),
        "metadata": Field(TABLE, "Kept with each key at the gateway.", default={}),
    },
    "command": {
        "command": Field(
            COMMAND,
            'A program that prints a key, or JSON with "key" and "ttl" or "expires_at".',
            required=True,
        ),
        "environment": Field(TEXTS, "Variables that are passed on to it.", default=()),
        "timeout": Field(DURATION, "The longest it may run.", default=timedelta(seconds=8)),
        "poll": Field(DURATION, "How often it is run.", default=timedelta(minutes=5)),
    },
    "static": {
        "key": Field(REFERENCE, "Where the key is."),
        "placeholder": Field(
            TEXT, "A value that is no secret, for gateways that check no key, such as Ollama."
        ),
        "timeout": Field(
            DURATION, "The longest reading it may take.", default=timedelta(seconds=8)
        ),
        "poll": Field(DURATION, "How often it is read.", default=timedelta(minutes=5)),
    },
}
SOURCES["vault"] = {
    **PLACE,
    "path": Field(
        VAULT_API_PATH,
        "As the API has it: secret/data/llm/key (KV 2), secret/llm/key (KV 1), "
        "database/creds/role (dynamic), database/static-creds/role (static-role).",
        required=True,
    ),
    "field": Field(TEXT, "The field of the answer's data that holds the key.", default="key"),
    "engine": Field(
        one_of("kv", "dynamic", "static-role"),
        "What is read there: a key that somebody keeps, one made for us with a lease, or one "
        "that Vault itself rotates.",
        default="kv",
    ),
    "version": Field(COUNT, "Always this version of a KV 2 secret; the newest when absent."),
    "parameters": Field(TABLE, "Sent along, to an engine that wants its path written (dynamic)."),
    "lifetime": Field(DURATION, "How far a renewal moves a lease's end; as granted when absent."),
    "allow_orphans": Field(
        BOOLEAN,
        "Take leases of more than 24h: one whose answer was lost lives so long (dynamic).",
        default=False,
    ),
    "poll": Field(DURATION, "How often it is read.", default=timedelta(seconds=60)),
    "timeout": Field(DURATION, "The longest one call takes.", default=timedelta(seconds=8)),
}
SOURCES["login"] = {
    "login": Field(LOGIN, "The login whose token is the key.", required=True),
    "poll": Field(
        DURATION, "How often it is looked at beside its renewals.", default=timedelta(hours=1)
    ),
    "timeout": Field(DURATION, "The longest one renewal takes.", default=timedelta(seconds=16)),
}
AWS_PLACE = {
    **aws.PLACE,
    "secret": Field(AWS_SECRET_ID, "Its name or its ARN in Secrets Manager.", required=True),
    "field": Field(
        POINTER, "The field of its JSON that holds the key, such as /key; else it is the key."
    ),
}
SOURCES["aws"] = {
    **AWS_PLACE,
    "poll": Field(DURATION, "How often it is looked at.", default=timedelta(seconds=60)),
    "timeout": Field(DURATION, "The longest one reading takes.", default=timedelta(seconds=8)),
}
READERS = Field(
    DURATION,
    "How often its readers look at it: a replaced key is held for two of these longer.",
    default=timedelta(seconds=60),
)
PUBLISH: dict[str, dict[str, Field]] = {
    "aws": {**AWS_PLACE, "poll": READERS},
    "vault": {
        **PLACE,
        "path": Field(VAULT_API_PATH, "Its path in a KV 2: secret/data/llm/key.", required=True),
        "field": Field(TEXT, "The field that holds the key.", default="key"),
        "poll": READERS,
    },
}
MINTING = frozenset({"litellm"})


@dataclass(frozen=True, slots=True)
class Publish:
    """Where each new key is put for others to read: one secret at AWS, or in a Vault."""

    to: str
    settings: Mapping[str, Any]
    account: aws.Account | None
    vault: Vault | None

    @property
    def issuer(self) -> Issuer:
        """The place, as something that is asked."""
        if self.vault is not None:
            return _vault_issuer(self.vault, self.settings)
        assert self.account is not None, "one of the two"
        return _aws_issuer(self.account, self.settings)


@dataclass(frozen=True, slots=True)
class Profile:
    """
    A named entry of the file, checked and with its defaults filled in.

    `raw` is the entry as it was written, in values that JSON knows: what a worker is given, to
    read it again by the same rules.
    """

    name: str
    base_url: str
    helper_ttl: timedelta
    hold: timedelta
    verify: str
    verify_model: str
    headers: Mapping[str, str]
    ca: str | None
    anthropic_key: bool
    push: bool
    max_live: int
    openai_base_url: str | None
    export: str
    users: tuple[str, ...]
    claude: Mapping[str, Any]
    type: str
    source: Mapping[str, Any]
    vault: Vault | None
    account: aws.Account | None
    publish: Publish | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def kind(self) -> Kind:
        if self.type == "vault" and self.source["engine"] == "dynamic":
            return Kind.LEASED
        return Kind.MINTED if self.type in MINTING else Kind.FOLLOWED

    @property
    def issuer(self) -> Issuer:
        """Who issues this profile's keys; a key of any other is not handed out."""
        vault = "" if self.vault is None else self.vault.text
        account = "" if self.account is None else self.account.text
        if self.kind is Kind.MINTED:
            url = self.source["url"] or origin(self.base_url)
            admin = self.source["admin"] or self.source["login"]
            return Issuer(self.type, url, admin, self.ca, vault, account)
        if self.type == "vault" and self.vault is not None:
            return _vault_issuer(self.vault, self.source)
        if self.type == "aws" and self.account is not None:
            return _aws_issuer(self.account, self.source)
        if self.type == "login":
            return Issuer(self.type, self.base_url, self.source["login"])
        if self.type == "command":
            return Issuer(self.type, self.base_url, Reference("command", self.source["command"]))
        return Issuer(self.type, self.base_url, self.source["key"], vault=vault, aws=account)

    @property
    def asked(self) -> tuple[Issuer, ...]:
        """All that is asked for this profile: who issues its keys, where they are published."""
        return (self.issuer,) if self.publish is None else (self.issuer, self.publish.issuer)

    @property
    def logins(self) -> tuple[SignIn, ...]:
        """The sign-ins that this profile's keys depend on."""
        return tuple(one for issuer in self.asked for one in needed_by(issuer))

    @property
    def openai_url(self) -> str:
        """The gateway for OpenAI's clients: not where Anthropic's have a path of their own."""
        return self.openai_base_url or f"{self.base_url.removesuffix('/anthropic')}/v1"

    @property
    def policy(self) -> Policy:
        """The numbers that the rule goes by."""
        common = {
            "kind": self.kind,
            "issuer": self.issuer,
            "hold": self.hold,
            "timeout": self.source["timeout"],
            "verify": self.verify != "none",
        }
        if self.kind is Kind.MINTED:
            return Policy(
                **common,
                lifetime=self.source["lifetime"],
                max_live=self.max_live,
                publishes=self.publish is not None,
            )
        if self.kind is Kind.LEASED:
            lifetime = LONGEST_ORPHAN if self.source["allow_orphans"] else LONGEST_LEASE
            return Policy(**common, lifetime=lifetime, max_live=self.max_live)
        poll: timedelta = self.source["poll"]
        retry_max = min(RETRY_MAX, max(poll, timedelta(seconds=5)))
        return Policy(**common, poll=poll, retry_max=retry_max)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works, but not as somebody may think."""
        found = []
        if self.source.get("max_budget") is not None:
            found.append(
                f"profiles.{self.name}.source.max_budget: a budget of each key starts anew at "
                "each rotation; set it for the user or team at the gateway to limit the sum"
            )
        places = [("base_url", self.base_url), ("source.url", self.source.get("url"))]
        if self.vault is not None:
            nodes = (self.vault.address, *self.vault.nodes)
            places += [("vault", url) for url in nodes]
        for name, url in places:
            if url and url.startswith("http://") and not is_loopback(url):
                found.append(f"profiles.{self.name}.{name}: http:// sends keys in clear")
        for sign_in in self.logins:
            for name in ("issuer", "url", "address", "token_url"):
                url = sign_in.settings.get(name)
                if url and url.startswith("http://") and not is_loopback(url):
                    found.append(f"logins.{sign_in.name}.{name}: http:// sends tokens in clear")
        if self.publish is not None and self.hold < 2 * self.publish.settings["poll"]:
            found.append(
                f"profiles.{self.name}.hold: shorter than two of its readers' looks "
                "(publish.poll): they may still use a key that is revoked"
            )
        window = self.claude.get("auto_compact_window")
        if window is not None and window < SMALLEST_WINDOW:
            found.append(
                f"profiles.{self.name}.claude.auto_compact_window: Claude Code takes it for "
                f"{SMALLEST_WINDOW}"
            )
        if self.verify == "none":
            found.append(f"profiles.{self.name}.verify: new keys are handed out untried")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole of it. `files` are those that were read, in order."""

    profiles: Mapping[str, Profile]
    default: str | None
    cache_key: str
    files: tuple[Path, ...]
    logins: Mapping[str, SignIn] = field(default_factory=dict)
    hooks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by event
    writable: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Say whether it is that of a shared host, whose daemon answers several users."""
        return any(profile.users for profile in self.profiles.values())

    def of(self, names: Collection[str]) -> "Config":
        """Return what some of the profiles are for those who may have no others."""
        theirs = {name: one for name, one in self.profiles.items() if name in names}
        default = self.default if self.default in theirs else None
        return replace(self, profiles=theirs, default=default)

    def profile(self, name: str | None) -> Profile:
        """
        Return a profile by its name, or the default, or the only one that is not an export's.

        Raises:
            ConfigError: There is no such profile, or several and none was named.
        """
        known = ", ".join(sorted(self.profiles))
        if name is not None:
            if name in self.profiles:
                return self.profiles[name]
            if is_made(name):
                raise ConfigError(f"{name}: {ENDED}", hint="keybroker run -- PROGRAM")
            hint = f"profiles: {known}" if known else "keybroker init"
            raise ConfigError(f"config: no profile {name[:32]!r}", hint=hint)
        if self.default is not None:
            return self.profiles[self.default]
        if (only := only_one(self.profiles.values())) is not None:
            return only
        if not self.profiles:
            raise ConfigError("config: no profile is configured", hint=_no_profile(self.files))
        raise ConfigError(
            "config: several profiles, and none was named",
            hint=f'--profile NAME, or default = "NAME" in the file: {known}',
        )


def only_one(profiles: Iterable[Profile]) -> Profile | None:
    """Return the profile that is meant without a name: those for other programs do not count."""
    found = list(profiles)
    usual = [one for one in found if one.export == "none"] or found
    return usual[0] if len(usual) == 1 else None


def _vault_issuer(vault: Vault, settings: Mapping[str, Any]) -> Issuer:
    pinned = "" if settings.get("version") is None else f"?version={settings['version']}"
    space = "" if vault.namespace is None else f"{vault.namespace}/"
    path = f"/v1/{space}{settings['path']}{pinned}#{settings['field']}"
    return Issuer("vault", vault.address + path, vault=vault.text)


def _aws_issuer(account: aws.Account, settings: Mapping[str, Any]) -> Issuer:
    field_of_it = "" if settings["field"] is None else f"#{settings['field']}"
    profile = f"{account.who}@" if account.who else ""
    place = f"{account.region or ''}/{settings['secret']}".removeprefix("/")
    return Issuer("aws", f"{profile}{place}{field_of_it}", aws=account.text)


def _no_profile(files: Sequence[Path]) -> str:
    return f"write [profiles.work] into {files[-1]}" if files else "keybroker init"


def origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def load(
    files: Sequence[Path],
    environment: Mapping[str, str] = os.environ,
    drafts: Mapping[Path, str] | None = None,
) -> Config:
    """
    Read and check the files that exist, later ones over earlier ones.

    Args:
        files: Those that may be there.
        environment: Has what a [vault] table leaves out.
        drafts: What some of them are about to be.

    Raises:
        ConfigError: The first thing that is wrong with them, by file, line and key.
    """
    document = read(files, drafts)
    return parse(document.tables, document.where, document.files, environment)


def parse(
    tables: Mapping[str, Any],
    where: Where,
    files: tuple[Path, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """
    Check a document.

    Raises:
        ConfigError: The first thing that is wrong with it.
    """
    allowed = [*GENERAL, *TABLES]
    for name in tables:
        if name not in allowed:
            raise where.error((name,), unknown(name, allowed))
    general = read_table_of({k: v for k, v in tables.items() if k in GENERAL}, GENERAL, (), where)
    cache = read_table_of(_dict(tables, "cache", where), CACHE, ("cache",), where)
    shared = _dict(tables, "defaults", where)
    for name in WHOLE:
        if name in shared:
            raise where.error(("defaults", name), "belongs into each profile; it is not shared")
    known = {name: Field(one.kind, one.doc) for name, one in PROFILE.items()}
    claude = _dict(shared, "claude", where, ("defaults",))
    read_table_of(claude, CLAUDE, ("defaults", "claude"), where)
    read_table_of({k: v for k, v in shared.items() if k != "claude"}, known, ("defaults",), where)
    logins = {}
    for name, entry in _dict(tables, "logins", where).items():
        raw = _dict({name: entry}, name, where, ("logins",))
        if raw.get("type") == "vault":
            place = {k: v for k, v in _dict(tables, "vault", where).items() if k in PLACE}
            raw = _located(raw, place, environment)
        logins[name] = read_login(name, raw, where)
    vault = expanded(_dict(tables, "vault", where), logins, ("vault",), where)
    for name in vault:
        if name not in (*PLACE, "auth"):
            raise where.error(("vault", name), unknown(name, [*PLACE, "auth"]))
    if vault:
        read_vault(with_variables(vault, environment), ("vault",), where)
    account = expanded(_dict(tables, "aws", where), logins, ("aws",), where)
    for name in account:
        if name not in aws.PLACE:
            raise where.error(("aws", name), unknown(name, list(aws.PLACE)))
    aws.read_account(account, ("aws",), where)
    sign_ins = {by: one.text for one in logins.values() if (by := one.at_aws) is not None}
    profiles = {}
    for name, entry in _dict(tables, "profiles", where).items():
        if not NAME.fullmatch(name):
            problem = "a profile's name has lower-case letters, digits, - and _, at most 32"
            raise where.error(("profiles", name), problem)
        if is_made(name):
            problem = "a name that ends so is one that `keybroker run` makes"
            raise where.error(("profiles", name), problem)
        if not isinstance(entry, dict):
            raise where.error(("profiles", name), "expected a table")
        for word in ("vault", "aws"):
            if word in entry:
                raise where.error(("profiles", name, word), unknown(word, list(PROFILE)))
        whole = {**shared, **entry}
        for word in ("source", "publish"):
            if word in whole:
                whole[word] = expanded(whole[word], logins, ("profiles", name, word), where)
        if claude and isinstance(entry.get("claude", {}), dict):
            whole["claude"] = {**claude, **entry.get("claude", {})}
        whole = _with_vault(name, whole, vault, environment, where)
        whole = _with_account(whole, account, sign_ins, environment)
        profiles[name] = read_profile(name, whole, where)
    default = general["default"]
    if default is not None and default not in profiles:
        raise where.error(("default",), "no profile has this name")
    hooks = read_table_of(_dict(tables, "hooks", where), HOOKS, ("hooks",), where)
    named = {event: command for event, command in hooks.items() if command is not None}
    service = read_table_of(_dict(tables, "service", where), SERVICE, ("service",), where)
    for folder in service["writable"]:
        if not folder.startswith(("/", "~/")):
            raise where.error(("service", "writable"), "expected folders that begin with / or ~/")
    return Config(profiles, default, cache["key"], files, logins, named, tuple(service["writable"]))


def _located(
    given: Mapping[str, Any], vault: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Say which Vault is meant: what is meant for one server is not taken to another."""
    whole = given if "address" in given else {**vault, **given}
    return with_variables(whole, environment)


def _with_vault(
    name: str,
    raw: dict[str, Any],
    vault: Mapping[str, Any],
    environment: Mapping[str, str],
    where: Where,
) -> dict[str, Any]:
    """Give a profile the Vault that it needs: a worker has its entry, and nothing else."""
    for table, key in (("source", "type"), ("publish", "to")):
        given = raw.get(table)
        if not isinstance(given, dict):
            continue
        if given.get(key) == "vault":
            if not vault and "auth" not in given:
                raise where.error(("profiles", name, table), NO_VAULT)
            raw = {**raw, table: _located(given, vault, environment)}
        elif _refers(given, "vault"):
            if not vault:
                raise where.error(("profiles", name, table), NO_VAULT)
            raw = {**raw, "vault": with_variables(vault, environment)}
    return raw


def _with_account(
    raw: dict[str, Any],
    account: Mapping[str, Any],
    sign_ins: Mapping[str, str],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Give a profile the account of AWS's that it needs."""

    def whole(given: Mapping[str, Any]) -> Mapping[str, Any]:
        other = given.keys() & {"profile", "role_arn"}  # than that of [aws]
        shared = {k: v for k, v in account.items() if k == "region" or not other}
        filled = aws.with_variables({**shared, **given}, environment)
        return aws.with_login(filled, sign_ins, environment)

    for table, key in (("source", "type"), ("publish", "to")):
        given = raw.get(table)
        if not isinstance(given, dict):
            continue
        if given.get(key) == "aws":
            raw = {**raw, table: whole(given)}
        elif _refers(given, "aws"):
            raw = {**raw, "aws": whole({})}
    return raw


def _refers(table: Mapping[str, Any], kind: str) -> bool:
    """Say whether a secret of a table is kept there."""
    return any(isinstance(value, dict) and kind in value for value in table.values())


def read_profile(name: str, raw: Mapping[str, Any], where: Where) -> Profile:
    """
    Read one profile's table.

    Raises:
        ConfigError: It has an unknown key, a wrong value, or numbers that cannot work together.
    """
    path = ("profiles", name)
    tables = ("claude", "source", "publish", "vault", "aws")
    given = {k: v for k, v in raw.items() if k not in tables}
    values = read_table_of(given, PROFILE, path, where)
    claude = read_table_of(_dict(raw, "claude", where, path), CLAUDE, (*path, "claude"), where)
    if "source" not in raw:
        raise where.error(path, "has no [source] table")
    source = _dict(raw, "source", where, path)
    kind = source.get("type")
    if not isinstance(kind, str) or kind not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise where.error((*path, "source", "type"), f"expected one of {known}")
    vault = account = None
    if kind == "vault":
        vault = read_vault(source, (*path, "source"), where)
    elif "vault" in raw:
        vault = read_vault(raw["vault"], ("vault",), where)
    if kind == "aws":
        account = _account(source, (*path, "source"), where)
    elif "aws" in raw:
        account = aws.read_account(raw["aws"], ("aws",), where)
    ours = ("type", "auth") if kind == "vault" else ("type",)
    rest = {k: v for k, v in source.items() if k not in ours}
    settings = read_table_of(rest, SOURCES[kind], (*path, "source"), where)
    publish = _read_publish(raw, path, where)
    readers = timedelta() if publish is None else 2 * publish.settings["poll"]
    # a token of a login lives for minutes: what it replaces is not kept for longer than is read
    usual = 3 * values["helper_ttl"] if kind == "login" else default_hold(values["helper_ttl"])
    values["hold"] = values["hold"] or usual + readers
    values["users"] = tuple(values["users"])
    profile = Profile(
        name=name,
        **values,
        claude={key: value for key, value in claude.items() if value not in (None, False)},
        type=kind,
        source=settings,
        vault=vault,
        account=account,
        publish=publish,
        raw=raw,
    )
    for key, problem in _contradictions(profile):
        raise where.error((*path, *key.split(".")), problem)
    return profile


def _read_publish(raw: Mapping[str, Any], path: tuple[str, ...], where: Where) -> Publish | None:
    """Read where a profile's keys are put for others."""
    if "publish" not in raw:
        return None
    path = (*path, "publish")
    given = _dict(raw, "publish", where, path[:-1])
    to = given.get("to")
    if not isinstance(to, str) or to not in PUBLISH:
        raise where.error((*path, "to"), f"expected one of {', '.join(sorted(PUBLISH))}")
    rest = {k: v for k, v in given.items() if k not in ("to", "auth")}
    if "auth" in given and to != "vault":
        raise where.error((*path, "auth"), unknown("auth", list(PUBLISH[to])))
    settings = read_table_of(rest, PUBLISH[to], path, where)
    if to == "vault":
        return Publish(to, settings, None, read_vault(given, path, where))
    return Publish(to, settings, _account(given, path, where), None)


def _account(given: Mapping[str, Any], path: tuple[str, ...], where: Where) -> aws.Account:
    """Read the account of a secret, whose ARN says its region."""
    return aws.account_of(str(given.get("secret")), aws.read_account(given, path, where))


def _contradictions(profile: Profile) -> Iterator[tuple[str, str]]:
    if profile.helper_ttl % timedelta(milliseconds=1):
        yield "helper_ttl", "expected whole milliseconds"
    if profile.type == "static":
        given = [k for k in ("key", "placeholder") if profile.source[k] is not None]
        if len(given) != 1:
            yield "source", "a static source has either key or placeholder"
        if profile.issuer.admin is not None and profile.issuer.admin.kind == "login":
            yield "source.key", 'the token of a login is renewed: type = "login"'
        value = profile.source["placeholder"] or "x"
        if not all("!" <= c <= "~" for c in value):
            yield "source.placeholder", "expected one word of printable ASCII"
        if value.startswith(("sk-", "Bearer")) or len(value) > 64:
            yield "source.placeholder", "this looks like a key; use key = { keyring = … }"
    if profile.type == "litellm":
        given = [k for k in ("admin", "login") if profile.source[k] is not None]
        if not given:
            rights = "where the key with key-management rights is; or login, which needs none"
            yield "source", f"has no admin: {rights}"
        if len(given) == 2:
            yield "source.login", "is in place of admin; take one of them out"
    if profile.kind is not Kind.MINTED and profile.verify == "info":
        yield "verify", f"a source of type {profile.type} has no key API to ask"
    if profile.type == "vault":
        yield from _vault_contradictions(profile)
    if profile.publish is not None:
        if profile.kind is not Kind.MINTED:
            yield "publish", f"a source of type {profile.type} mints no keys to publish"
        if profile.publish.to == "vault" and "/data/" not in profile.publish.settings["path"]:
            yield "publish.path", "expected a path of KV 2, with /data/ in it"
        if profile.verify == "none":
            yield "verify", "a key is tried before it is published for others"
    if profile.kind is Kind.FOLLOWED:
        return
    if profile.max_live < 3:
        yield "max_live", "a rotation needs room for 3 keys: old, new, and one not yet revoked"
    lifetime: timedelta | None = profile.source["lifetime"]
    if lifetime is None:
        return
    if lifetime % timedelta(seconds=1):
        yield "source.lifetime", "expected whole seconds"
    if lifetime < shortest_lifetime(profile.hold):
        # rounded up; both ways that are offered must work when they are typed
        least = -_whole(-max(shortest_lifetime(profile.hold), 4 * profile.helper_ttl))
        yield (
            "source.lifetime",
            (
                f"{show_duration(lifetime)} is less than three times the hold of "
                f"{show_duration(profile.hold)}; a lifetime of {show_duration(least)} works, or a "
                f"hold of {show_duration(_whole(lifetime / 3))} and a helper_ttl of at most "
                f"{show_duration(_whole(lifetime / 4))}"
            ),
        )
    if profile.helper_ttl > lifetime / 4:
        yield (
            "helper_ttl",
            (
                f"more than a quarter of the lifetime of {show_duration(lifetime)}; at most "
                f"{show_duration(_whole(lifetime / 4))} works"
            ),
        )


def _vault_contradictions(profile: Profile) -> Iterator[tuple[str, str]]:
    source, engine = profile.source, profile.source["engine"]
    versioned = engine == "kv" and "/data/" in source["path"]
    if source["version"] is not None and not versioned:
        yield "source.version", "only a KV 2 secret has versions: its path has /data/ in it"
    if engine != "dynamic":
        for name in ("parameters", "lifetime"):
            if source[name] is not None:
                yield f"source.{name}", 'is for engine = "dynamic"'
        if source["allow_orphans"]:
            yield "source.allow_orphans", 'is for engine = "dynamic"'


def _whole(length: timedelta) -> timedelta:
    """Round down to what reads well."""
    one = timedelta(milliseconds=1 if timedelta(0) < length < timedelta(seconds=1) else 1000)
    return length // one * one


def _dict(
    tables: Mapping[str, Any], name: str, where: Where, path: tuple[str, ...] = ()
) -> dict[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, dict):
        raise where.error((*path, name), "expected a table")
    return found
