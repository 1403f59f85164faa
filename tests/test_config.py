"""The configuration: what is wrong with it is said by file, line and key, and never quoted."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from keybroker.config import Config, Profile, load, parse
from keybroker.credential import Issuer, Reference
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.fields import show_duration
from keybroker.paths import config_files
from keybroker.rotation import Kind, Policy
from keybroker.schema import schema

CANARY = "sk-canary-Zx81QpLmWvUtsRqPoNmLkJiHgFeDcBa9876543210"
HEAD = 'base_url = "https://llm.example.com"\n'
SOURCE = '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
PUBLISH = "[profiles.work.publish]\nto = 'aws'\nsecret = 'llm/key'\n"
WORK = f"[profiles.work]\n{HEAD}{SOURCE}"


def read(text: str) -> Config:
    """Parse a document as if it were in `c.toml`, without the places of its keys."""
    return parse(tomllib.loads(text), Where({}, "c.toml"))


def profile(settings: str = "", source: str = "", *, head: str = HEAD) -> Profile:
    """Return a LiteLLM profile with more settings."""
    return read(f"[profiles.work]\n{head}{settings}\n{SOURCE}{source}").profile("work")


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(text)
    return error.value.message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_the_smallest_profile_has_every_default() -> None:
    """Where it is, what mints there, and nothing else has to be said."""
    found = profile()

    assert {name: getattr(found, name) for name in found.__slots__} | {"raw": None} == {
        "name": "work",
        "base_url": "https://llm.example.com",
        "helper_ttl": timedelta(seconds=60),
        "hold": timedelta(minutes=15),
        "verify": "auto",
        "verify_model": "claude-sonnet-4-5",
        "headers": {},
        "ca": None,
        "anthropic_key": False,
        "push": True,
        "max_live": 4,
        "openai_base_url": None,
        "export": "none",
        "users": (),
        "claude": {},
        "type": "litellm",
        "source": {
            "admin": Reference("env", "ADMIN"),
            "login": None,
            "url": None,
            "lifetime": timedelta(hours=12),
            "timeout": timedelta(seconds=8),
            "models": (),
            "key_type": "llm_api",
            "max_budget": None,
            "budget_duration": None,
            "rpm_limit": None,
            "tpm_limit": None,
            "max_parallel_requests": None,
            "user_id": None,
            "team_id": None,
            "metadata": {},
        },
        "account": None,
        "publish": None,
        "vault": None,
        "raw": None,
    }
    assert found.kind is Kind.MINTED
    assert found.warnings == ()


def test_a_profile_makes_the_rule_s_numbers() -> None:
    """What the rotation is decided by comes from the file."""
    found = profile(
        'hold = "20m"\nmax_live = 5\nverify = "none"', 'lifetime = "2h"\ntimeout = "3s"'
    )

    assert found.policy == Policy(
        Kind.MINTED,
        Issuer("litellm", "https://llm.example.com", Reference("env", "ADMIN")),
        hold=timedelta(minutes=20),
        lifetime=timedelta(hours=2),
        timeout=timedelta(seconds=3),
        max_live=5,
        verify=False,
    )


@pytest.mark.parametrize(
    ("text", "issuer"),
    [
        (
            (
                '[profiles.p]\nbase_url = "https://h.example/some/path"\nca = "/ca.pem"\n'
                '[profiles.p.source]\ntype = "litellm"\nadmin = { file = "/a" }'
            ),
            Issuer("litellm", "https://h.example", Reference("file", "/a"), "/ca.pem"),
        ),
        (
            (
                '[profiles.p]\nbase_url = "https://h.example"\n'
                '[profiles.p.source]\ntype = "litellm"\nadmin = { env = "A" }\n'
                'url = "https://keys.example/x/"'
            ),
            Issuer("litellm", "https://keys.example/x", Reference("env", "A")),
        ),
        (
            (
                '[profiles.p]\nbase_url = "https://h.example"\n'
                '[profiles.p.source]\ntype = "command"\ncommand = ["op", "read"]'
            ),
            Issuer("command", "https://h.example", Reference("command", ("op", "read"))),
        ),
        (
            (
                '[profiles.p]\nbase_url = "https://h.example"\n'
                '[profiles.p.source]\ntype = "static"\nkey = { keyring = "k" }'
            ),
            Issuer("static", "https://h.example", Reference("keyring", "k")),
        ),
        (
            (
                '[profiles.p]\nbase_url = "http://localhost:11434"\n'
                '[profiles.p.source]\ntype = "static"\nplaceholder = "ollama"'
            ),
            Issuer("static", "http://localhost:11434"),
        ),
    ],
)
def test_an_issuer_is_where_a_key_is_revoked(text: str, issuer: Issuer) -> None:
    """A minting source is asked at the origin of base_url unless its own address is given."""
    assert read(text).profile(None).issuer == issuer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour = 1", "colour: unknown key"),
        ("defualt = 'work'", "defualt: unknown key; did you mean default?"),
        ("profile = 1", "profile: unknown key; did you mean profiles?"),
        ("default = 7", "default: expected text"),
        (f"default = 'home'\n{WORK}", "default: no profile has this name"),
        ("cache = 1", "cache: expected a table"),
        ("cache.kye = 'file'", "cache.kye: unknown key; did you mean key?"),
        ("cache.key = 'disk'", "cache.key: expected one of auto, keyring, file, memory"),
        ("defaults = 1", "defaults: expected a table"),
        ("defaults.hodl = '1h'", "defaults.hodl: unknown key; did you mean hold?"),
        ("defaults.hold = '1'", 'defaults.hold: expected a duration such as "90s", "15m" or "12h"'),
        ("defaults.publish.to = 'aws'", "defaults.publish: belongs into each profile"),
        (
            "defaults.source.type = 'litellm'",
            "defaults.source: belongs into each profile; it is not shared",
        ),
        ("profiles = 1", "profiles: expected a table"),
        ("profiles.work = 1", "profiles.work: expected a table"),
        (
            "[profiles.Work]",
            "profiles.Work: a profile's name has lower-case letters, digits, - and _, at most 32",
        ),
        (
            "[profiles.work]",
            'profiles.work: has no base_url, such as base_url = "https://llm.example.com"',
        ),
        (f"[profiles.work]\n{HEAD}", "profiles.work: has no [source] table"),
        (f"[profiles.work]\n{HEAD}source = 1", "profiles.work.source: expected a table"),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\nlifetime = '12h'",
            (
                "profiles.work.source.type: expected one of aws, command, "
                "litellm, login, static, vault"
            ),
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'litelm'",
            (
                "profiles.work.source.type: expected one of aws, command, "
                "litellm, login, static, vault"
            ),
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = ['litellm']",
            (
                "profiles.work.source.type: expected one of aws, command, "
                "litellm, login, static, vault"
            ),
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'litellm'",
            "profiles.work.source: has no admin: where the key with key-management rights is",
        ),
        (
            f"{WORK}lifetme = '1h'",
            "profiles.work.source.lifetme: unknown key; did you mean lifetime?",
        ),
        (f"{WORK}poll = '1h'", "profiles.work.source.poll: unknown key"),
        (f"{WORK}models = 'all'", "profiles.work.source.models: expected a list of texts: "),
        (f"{WORK}max_budget = 0", "profiles.work.source.max_budget: expected a number above zero"),
        (f"{WORK}rpm_limit = 1.5", "profiles.work.source.rpm_limit: expected a whole number above"),
        (f"{WORK}url = 'llm'", "profiles.work.source.url: expected an address such as "),
        (f"{WORK}lifetime = '3600.5s'", "profiles.work.source.lifetime: expected whole seconds"),
        (
            f"[profiles.work]\nhelper_ttl = '0.5ms'\n{HEAD}{SOURCE}",
            "profiles.work.helper_ttl: expected whole milliseconds",
        ),
        (
            f"[profiles.work]\nmax_live = 2\n{HEAD}{SOURCE}",
            "profiles.work.max_live: a rotation needs room for 3 keys: ",
        ),
        (
            f"[profiles.work]\nhelper_ttl = '5m'\nhold = '1m'\n{HEAD}{SOURCE}lifetime = '10m'",
            "profiles.work.helper_ttl: more than a quarter of the lifetime of 10m; at most 150s",
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'command'",
            "profiles.work.source: has no command: ",
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'static'",
            "profiles.work.source: a static source has either key or placeholder",
        ),
        (
            (
                f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'static'\n"
                "placeholder = 'x'\nkey = { env = 'K' }"
            ),
            "profiles.work.source: a static source has either key or placeholder",
        ),
        (
            f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'static'\nplaceholder = 'a b'",
            "profiles.work.source.placeholder: expected one word of printable ASCII",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_key(text: str, said: str) -> None:
    """The first thing that is wrong; a misspelt key with the one that was probably meant."""
    assert refused(text).startswith(f"c.toml: {said}")


def test_an_error_names_file_and_line(file: Path) -> None:
    """An editor can jump there."""
    file.write_text(f"# mine\n{WORK}lifetme = '1h'\n")
    file.chmod(0o600)

    with pytest.raises(ConfigError) as error:
        load([file])

    assert error.value.message == (
        f"{file}:7: profiles.work.source.lifetme: unknown key; did you mean lifetime?"
    )


def test_a_table_that_was_written_into_another_is_said_at_its_own_line(file: Path) -> None:
    """A dotted key at the end of a file belongs to the last table in it."""
    file.write_text(f"{WORK}\ncache.key = 'file'\n")
    file.chmod(0o600)

    with pytest.raises(ConfigError) as error:
        load([file])

    line = 2 + WORK.count("\n")
    said = "profiles.work.source.cache: cache is a table of its own: [cache]"
    assert error.value.message == f"{file}:{line}: {said}"


@pytest.mark.parametrize(
    "text",
    [
        f"{WORK}".replace('{ env = "ADMIN" }', f"'{CANARY}'"),
        f"{WORK}".replace('"ADMIN"', f"'{CANARY}'"),
        f"{WORK}".replace("env = ", "file = ").replace('"ADMIN"', f"'{CANARY}'"),
        f"{WORK}".replace("env = ", "keyring = ").replace('"ADMIN"', f"'{CANARY}'"),
        f"{WORK}".replace('{ env = "ADMIN" }', f'["{CANARY}"]'),
        f"{WORK}".replace('{ env = "ADMIN" }', f'{{ "{CANARY}" = 1 }}'),
        f"{WORK}".replace("https://", f"https://user:{CANARY}@"),
        f"{WORK}".replace(".com", f".com/?key={CANARY}"),
        f"{WORK}{CANARY} = 1",
        f"{WORK}lifetime = '{CANARY}'",
        f"{WORK}models = '{CANARY}'",
        f"{WORK}key_type = '{CANARY}'",
        f"default = '{CANARY}'\n{WORK}",
        f"cache.key = '{CANARY}'",
        f"[profiles.{CANARY}]",
        f"[profiles.work]\nheaders = {{ Authorization = 'Bearer {CANARY}' }}\n{HEAD}{SOURCE}",
        f"[profiles.work]\nheaders = {{ X-Org = '{CANARY}' }}\n{HEAD}{SOURCE}",
        f"[profiles.work]\nverify = '{CANARY}'\n{HEAD}{SOURCE}",
        f"[profiles.work]\n{HEAD}source = {{ type = '{CANARY}' }}",
        f"[profiles.work]\n{HEAD}source = {{ type = 'static', key = '{CANARY}' }}",
        f"[profiles.work]\n{HEAD}source = {{ type = 'static', placeholder = '{CANARY}' }}",
        f"[profiles.work]\n{HEAD}source = {{ type = 'command', command = '{CANARY}' }}",
    ],
)
def test_a_key_that_was_pasted_is_refused_and_not_repeated(text: str) -> None:
    """Wherever it was put: the message goes to terminals, logs and bug reports."""
    message = refused(text)

    assert "canary" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("helper_ttl", "hold"), [("1m", "15m"), ("2m", "16m"), ("5m", "25m"), ("10m", "40m")]
)
def test_the_default_hold_follows_the_helper_ttl(helper_ttl: str, hold: str) -> None:
    """The longer of a quarter of an hour and three refreshes and ten minutes."""
    assert show_duration(profile(f"helper_ttl = '{helper_ttl}'").hold) == hold


@pytest.mark.parametrize(
    ("settings", "source", "said"),
    [
        (
            "",
            "lifetime = '30m'",
            (
                "30m is less than three times the hold of 15m; a lifetime of 45m works, or a hold "
                "of 10m and a helper_ttl of at most 450s"
            ),
        ),
        (
            "helper_ttl = '16m'",
            "lifetime = '1h'",
            (
                "1h is less than three times the hold of 58m; a lifetime of 174m works, or a hold "
                "of 20m and a helper_ttl of at most 15m"
            ),
        ),
        (
            "hold = '700ms'\nhelper_ttl = '100ms'",
            "lifetime = '2s'",
            (
                "2s is less than three times the hold of 700ms; a lifetime of 3s works, or a hold "
                "of 666ms and a helper_ttl of at most 500ms"
            ),
        ),
        (
            "hold = '1m'\nhelper_ttl = '1h'",
            "lifetime = '2m'",
            (
                "2m is less than three times the hold of 1m; a lifetime of 4h works, or a hold "
                "of 40s and a helper_ttl of at most 30s"
            ),
        ),
    ],
)
def test_a_lifetime_too_short_is_refused_with_numbers_that_work(
    settings: str, source: str, said: str
) -> None:
    """A person types one of the two, and it is done."""
    text = f"[profiles.work]\n{HEAD}{settings}\n{SOURCE}{source}"

    assert refused(text) == f"c.toml: profiles.work.source.lifetime: {said}"


MILLISECONDS = st.integers(1, 10**9).map(lambda n: timedelta(milliseconds=n))
SUGGESTED = re.compile(
    r"a lifetime of (\S+) works, or a hold of (\S+) and a helper_ttl of at most (\S+)"
)


@given(MILLISECONDS, st.none() | MILLISECONDS, st.integers(1, 10**6))
def test_whatever_is_suggested_is_accepted(
    helper_ttl: timedelta, hold: timedelta | None, lifetime_s: int
) -> None:
    """Numbers that were refused come back as numbers that are taken, by either way."""

    def attempt(ttl: str, hold: str | None, lifetime: str) -> str:
        """Return what is wrong with these numbers; nothing when they are taken."""
        settings = f'helper_ttl = "{ttl}"\n' + (f'hold = "{hold}"\n' if hold else "")
        try:
            profile(settings, f'lifetime = "{lifetime}"')
        except ConfigError as error:
            return error.message
        return ""

    ttl, held = show_duration(helper_ttl), show_duration(hold) if hold else None
    lifetime = f"{lifetime_s}s"
    problem = attempt(ttl, held, lifetime)
    if found := SUGGESTED.search(problem):
        shorter = min(found[3], ttl, key=lambda text: profile_ttl(text))
        assert attempt(ttl, held, found[1]) == ""
        assert attempt(shorter, found[2], lifetime) == ""
    elif problem:
        at_most = re.search(r"at most (\S+) works", problem)
        assert at_most is not None
        assert attempt(at_most[1], held, lifetime) == ""


def profile_ttl(text: str) -> timedelta:
    from keybroker.fields import read_duration

    return read_duration(text)


def test_what_all_profiles_share_stands_in_defaults() -> None:
    """A profile's own setting wins over it."""
    text = (
        "[defaults]\nhelper_ttl = '30s'\nbase_url = 'https://all.example'\n"
        f"[profiles.a]\n{SOURCE.replace('work', 'a')}"
        f"[profiles.b]\nhelper_ttl = '10s'\n{SOURCE.replace('work', 'b')}"
    )

    found = read(text).profiles

    assert {name: (one.base_url, one.helper_ttl.seconds) for name, one in found.items()} == {
        "a": ("https://all.example", 30),
        "b": ("https://all.example", 10),
    }


def test_a_user_s_file_is_merged_over_the_system_s(tmp_path: Path) -> None:
    """The system has the profile, the user another hold."""
    system, user = tmp_path / "system.toml", tmp_path / "user.toml"
    system.write_text(WORK)
    user.write_text("[profiles.work]\nhold = '20m'\n[cache]\nkey = 'file'\n")
    for one in (system, user):
        one.chmod(0o600)

    found = load([system, user])

    assert found.profile("work").hold == timedelta(minutes=20)
    assert (found.cache_key, found.files) == ("file", (system, user))


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (WORK, None, "work"),
        (WORK, "work", "work"),
        (f"default = 'work'\n{WORK}{WORK.replace('work', 'home')}", None, "work"),
        (f"default = 'work'\n{WORK}{WORK.replace('work', 'home')}", "home", "home"),
    ],
)
def test_a_profile_is_named_or_the_only_one_or_the_default(
    text: str, name: str | None, found: str
) -> None:
    """With one profile nobody has to name it."""
    assert read(text).profile(name).name == found


@pytest.mark.parametrize(
    ("text", "name", "said", "hint"),
    [
        ("", None, "config: no profile is configured", "keybroker init"),
        ("", "work", "config: no profile 'work'", "keybroker init"),
        (WORK, "wrok", "config: no profile 'wrok'", "profiles: work"),
        (
            f"{WORK}{WORK.replace('work', 'home')}",
            None,
            "config: several profiles, and none was named",
            '--profile NAME, or default = "NAME" in the file: home, work',
        ),
    ],
)
def test_no_profile_is_guessed(text: str, name: str | None, said: str, hint: str) -> None:
    """What there is to choose from is said."""
    with pytest.raises(ConfigError) as error:
        read(text).profile(name)

    assert (error.value.message, error.value.hint) == (said, hint)


def test_an_empty_file_is_told_what_to_write_into_it(file: Path) -> None:
    """The hint names the file."""
    file.write_text("")
    file.chmod(0o600)

    with pytest.raises(ConfigError) as error:
        load([file]).profile(None)

    assert error.value.hint == f"write [profiles.work] into {file}"


@pytest.mark.parametrize(
    ("settings", "source", "head", "warned"),
    [
        ("verify = 'none'", "", HEAD, "profiles.work.verify: "),
        ("", "max_budget = 5", HEAD, "profiles.work.source.max_budget: "),
        ("", "", "base_url = 'http://llm.example.com'\n", "profiles.work.base_url: http:// "),
        ("", "url = 'http://10.0.0.1'", HEAD, "profiles.work.source.url: http:// "),
        (f"hold = '2m'\n{PUBLISH}poll = '61s'\n", "", HEAD, "profiles.work.hold: shorter than "),
    ],
)
def test_what_works_but_not_as_one_may_think_is_a_warning(
    settings: str, source: str, head: str, warned: str
) -> None:
    """One warning each, with the key that it is about."""
    [warning] = profile(settings, source, head=head).warnings

    assert warning.startswith(warned)


CORP = "\n[logins.corp]\ntype = 'oidc'\nissuer = 'https://login.example.com'\n"
SIGNED_IN = "[profiles.work]\nbase_url = 'https://llm.example.com'\n[profiles.work.source]\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            f"{SIGNED_IN}type = 'static'\nkey = {{ login = 'corp' }}{CORP}",
            ':5: profiles.work.source.key: the token of a login is renewed: type = "login"',
        ),
        (
            f"{SIGNED_IN}type = 'login'\nlogin = 'corp'{CORP}port = 65536\n",
            ":9: logins.corp.port: expected a port, from 1 to 65535",
        ),
    ],
)
def test_a_login_that_could_not_work_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError) as raised:
        load([file], {})
    assert raised.value.message == f"{file}{problem}"


def test_a_key_that_others_read_is_held_for_two_of_their_looks() -> None:
    """Beside what a reader of ours may keep it; nobody has to reckon."""
    assert profile(f"{PUBLISH}poll = '5m'\n").hold == timedelta(minutes=15 + 2 * 5)
    assert profile(f"{PUBLISH}poll = '5m'\n").warnings == ()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:4000", "[::1]:4000"])
def test_clear_text_on_this_machine_is_no_warning(host: str) -> None:
    """A gateway on the same machine is reached over no wire."""
    assert profile(head=f"base_url = 'http://{host}'\n").warnings == ()


@pytest.mark.parametrize(
    ("issuer", "warned"),
    [
        ("https://login.example.com", ()),
        ("http://127.0.0.1:4455", ()),
        (
            "http://login.example.com",
            ("logins.corp.issuer: http:// sends tokens in clear",),
        ),
    ],
)
def test_a_sign_in_without_tls_is_a_warning(issuer: str, warned: tuple[str, ...]) -> None:
    """Of each profile that is had with it."""
    text = (
        f"[logins.corp]\ntype = 'oidc'\nissuer = '{issuer}'\n[profiles.work]\n{HEAD}"
        "[profiles.work.source]\ntype = 'login'\nlogin = 'corp'\n"
    )
    assert read(text).profile("work").warnings == warned


def test_one_variable_names_another_file() -> None:
    """KEYBROKER_CONFIG stands for all other files; without it, the system's and the user's."""
    home = {"HOME": "/home/me"}

    assert config_files({**home, "KEYBROKER_CONFIG": "/a/b.toml"}) == (Path("/a/b.toml"),)
    assert config_files({"KEYBROKER_CONFIG": "b.toml"}) == (Path.cwd() / "b.toml",)
    assert config_files({**home, "KEYBROKER_CONFIG": ""})[-1].name == "config.toml"


VALIDATOR = Draft202012Validator(schema())
TAKEN = [
    "",
    WORK,
    f"default = 'work'\ncache.key = 'file'\n{WORK}",
    f"[defaults]\nbase_url = 'https://a.example'\n[profiles.work]\n{SOURCE}",
    (
        f"[profiles.work]\n{HEAD}helper_ttl = '1.5m'\nhold = '20m'\nverify = 'message'\n"
        "verify_model = 'm'\nca = '/x.pem'\nanthropic_key = true\nmax_live = 6\n"
        f"headers = {{ X-Org-Route = 'eng' }}\n{SOURCE}"
        "url = 'http://127.0.0.1:4000/x'\nlifetime = '1d'\ntimeout = '250ms'\nmodels = ['a', 'b']\n"
        "key_type = 'default'\nmax_budget = 0.5\nbudget_duration = '24h'\nrpm_limit = 1\n"
        "tpm_limit = 2\nmax_parallel_requests = 3\nuser_id = 'u'\nteam_id = 't'\n"
        "metadata = { a = 'b' }\n"
    ),
    (
        f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'command'\ncommand = ['a']\n"
        "environment = ['A']\ntimeout = '1s'\npoll = '1m'\n"
    ),
    f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'static'\nplaceholder = 'x'\n",
    *(
        f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'static'\nkey = {reference}\n"
        for reference in (
            "{ env = 'K' }",
            "{ file = '/k' }",
            "{ keyring = 'k' }",
            "{ command = ['a', 'b'] }",
        )
    ),
]
# What the schema cannot know is not here: numbers that do not work together, names that do not
# exist, keys that only look like keys.
REFUSED = [
    "colour = 1",
    "default = 1",
    "default = ''",
    "cache = 1",
    "cache.key = 'disk'",
    "cache.colour = 1",
    "defaults.colour = 1",
    "defaults.hold = 15",
    "profiles = []",
    "profiles.work = 1",
    "[profiles.Work]",
    f"{WORK}".replace("profiles.work", "profiles." + "x" * 33),
    f"[profiles.work]\n{HEAD}",
    f"[profiles.work]\n{HEAD}source = 'litellm'",
    f"[profiles.work]\n{HEAD}colour = 1\n{SOURCE}",
    f"[profiles.work]\n{HEAD}hold = '15'\n{SOURCE}",
    f"[profiles.work]\n{HEAD}hold = '15 m'\n{SOURCE}",
    f"[profiles.work]\n{HEAD}verify = 'perhaps'\n{SOURCE}",
    f"[profiles.work]\n{HEAD}anthropic_key = 'yes'\n{SOURCE}",
    f"[profiles.work]\n{HEAD}max_live = 0\n{SOURCE}",
    f"[profiles.work]\n{HEAD}max_live = true\n{SOURCE}",
    f"[profiles.work]\n{HEAD}headers = {{ X = 1 }}\n{SOURCE}",
    f"[profiles.work]\n{HEAD}headers = {{ X = '' }}\n{SOURCE}",
    f"[profiles.work]\nbase_url = 'llm.example.com'\n{SOURCE}",
    f"[profiles.work]\nbase_url = 'https://me@llm.example.com'\n{SOURCE}",
    f"{WORK}".replace("litellm", "litelm"),
    f"{WORK}".replace('type = "litellm"', ""),
    f"{WORK}".replace('{ env = "ADMIN" }', "'ADMIN'"),
    f"{WORK}".replace('{ env = "ADMIN" }', "{}"),
    f"{WORK}".replace('{ env = "ADMIN" }', "{ vault = 'a' }"),
    f"{WORK}".replace('{ env = "ADMIN" }', "{ env = 'A', file = 'b' }"),
    f"{WORK}".replace('{ env = "ADMIN" }', "{ env = '' }"),
    f"{WORK}".replace('{ env = "ADMIN" }', "{ command = [] }"),
    f"{WORK}".replace("admin", "adnim"),
    f"{WORK}colour = 1",
    f"{WORK}lifetime = '-1h'",
    f"{WORK}models = 'a'",
    f"{WORK}models = ['']",
    f"{WORK}max_budget = 0",
    f"{WORK}max_budget = '5'",
    f"{WORK}rpm_limit = 0.5",
    f"{WORK}user_id = ''",
    f"{WORK}metadata = {{ a = 1 }}",
    f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'command'\n",
    f"[profiles.work]\n{HEAD}[profiles.work.source]\ntype = 'command'\ncommand = 'a'\n",
]


def test_the_schema_is_one() -> None:
    """Editors take it as it is."""
    Draft202012Validator.check_schema(schema())

    assert json.loads(json.dumps(schema())) == schema()


@pytest.mark.parametrize("text", TAKEN)
def test_the_schema_takes_what_is_taken(text: str) -> None:
    """An editor underlines nothing that works."""
    read(text)

    assert [error.message for error in VALIDATOR.iter_errors(tomllib.loads(text))] == []


@pytest.mark.parametrize("text", REFUSED)
def test_the_schema_refuses_what_is_refused(text: str) -> None:
    """An editor underlines what would be an error later."""
    assert refused(text)
    assert not VALIDATOR.is_valid(tomllib.loads(text))


def test_every_default_of_the_schema_is_accepted() -> None:
    """What an editor fills in works."""
    defaults = {
        name: found["default"]
        for name, found in schema()["properties"]["defaults"]["properties"].items()
        if "default" in found
    }
    assert "helper_ttl" in defaults

    parse({"defaults": defaults, **tomllib.loads(WORK)}, Where({}, "c.toml"))


SEED = f"default = 'work'\n[cache]\nkey = 'file'\n{TAKEN[4]}[profiles.b]\n{HEAD}".encode()
SEED += f"[profiles.b.source]\ntype = 'command'\ncommand = ['echo', '{CANARY}']\n".encode()
PIECES = [b"", b"'", b'"', b"=", b"[", b"]", b"{", b"}", b"\n", b"#", b".", b"\\", b"\x00", b"\xff"]
PIECES += [CANARY.encode(), b"'''", b'"""', b"1e999", b"-", b"true", b"[[", b"source", b"type"]
EDITS = st.tuples(st.integers(0, len(SEED)), st.integers(0, 30), st.sampled_from(PIECES))


def check(file: Path, data: bytes) -> None:
    """A document is a configuration, or an error of one kind that quotes nothing."""
    file.write_bytes(data)
    try:
        found = load([file])
        for one in found.profiles.values():
            assert (one.policy.hold, one.issuer.type) == (one.hold, one.type)
        assert isinstance(found.profile(None), Profile)
    except ConfigError as error:
        assert error.message.startswith((f"{file}:", "config: "))
        assert "\n" not in error.message
        assert CANARY not in f"{error.message} {error.hint}"


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    (folder / "config.toml").touch(0o600)
    return folder / "config.toml"


def test_the_seed_of_the_edits_is_a_configuration(drafts: Path) -> None:
    """Edits begin from something that is taken."""
    drafts.write_bytes(SEED)

    assert set(load([drafts]).profiles) == {"work", "b"}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_configuration_or_an_error(drafts: Path, data: bytes) -> None:
    """Nothing but ConfigError comes out, whatever is in the file."""
    check(drafts, data)


@given(st.lists(EDITS, min_size=1, max_size=4))
def test_any_edit_of_a_good_file_is_a_configuration_or_an_error(
    drafts: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    """And a key that stands in it is not in what is said."""
    data = SEED
    for at, length, piece in edits:
        data = data[:at] + piece + data[at + length :]
    check(drafts, data)


def swap(document: Any, at: list[int], value: object) -> Any:
    """Put a value in the place of some part of a document."""
    if not at or not isinstance(document, dict | list) or not document:
        return value
    if isinstance(document, dict):
        name = sorted(document)[at[0] % len(document)]
        return {**document, name: swap(document[name], at[1:], value)}
    index = at[0] % len(document)
    return [*document[:index], swap(document[index], at[1:], value), *document[index + 1 :]]


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(CANARY),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)


@given(st.lists(st.integers(0, 30), max_size=5), VALUES)
def test_any_value_in_any_place_is_taken_or_refused(at: list[int], value: object) -> None:
    """Every value of every type, wherever it is put; and none is repeated."""
    tables = swap(tomllib.loads(TAKEN[4]), at, value)
    if not isinstance(tables, dict):
        return
    try:
        parse(tables, Where({}, "c.toml"))
    except ConfigError as error:
        assert CANARY not in error.message
