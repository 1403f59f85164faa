"""
Where requests go and with which key: what doctor says beforehand, against the real client.

A client is started in each combination of sources and ended as soon as its first message is
there. Each place has a value of its own, so that what was sent says where it came from.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from keybroker.connect.plan import Place
from keybroker.doctor.origins import collect
from keybroker.doctor.requests import (
    ADDRESS,
    HEADERS,
    KEY,
    LOGIN_TOKEN,
    MODES,
    TOKEN,
    USE,
    Held,
    Layer,
    Part,
    route,
)
from tests.resident import fresh_home, until
from tests.servers.claude import NEWEST, WITH_NODE_20, environment, start_stream
from tests.servers.managed import Machine
from tests.servers.upstream import Upstream

AT_ONCE = 3
ETC = "machine/etc/claude-code/"
FILES = {
    "user": ".claude/settings.json",
    "project": "project/.claude/settings.json",
    "local": "project/.claude/settings.local.json",
    "managed": f"{ETC}managed-settings.json",
    "first drop-in": f"{ETC}managed-settings.d/10-a.json",
    "last drop-in": f"{ETC}managed-settings.d/90-b.json",
}
OF_USER = ("user", "project", "local")
MANAGED = set(FILES) - set(OF_USER)
SHORT = {TOKEN: "token", KEY: "key", LOGIN_TOKEN: "oauth"}
Headers = tuple[str | None, str | None]


@dataclass(frozen=True)
class Case:
    """
    What is set where.

    Attributes:
        settings: By scope; `{url}` in an address becomes that of the scope's own server.
        process: What the client is started with.
        login: One at Anthropic is saved.
    """

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    process: Mapping[str, str] = field(default_factory=dict)
    login: bool = False


def value(name: str, scope: str) -> str:
    """Return the value that a credential has in one place."""
    return f"{SHORT.get(name, name)}-of-{scope}"


def helper(scope: str) -> str:
    return f"echo {value('helper', scope)}"


def furnish(home: Path, case: Case, servers: Mapping[str, Upstream]) -> dict[str, str]:
    """Write what is set, and return what the client is started with besides."""
    for scope, settings in case.settings.items():
        if scope in MANAGED:
            continue
        path = home / FILES[scope]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings).replace("{url}", servers[scope].url))
    if case.login:
        login = {"accessToken": "login", "refreshToken": "r", "scopes": ["user:inference"]}
        login |= {"expiresAt": int(time.time() + 86_400) * 1000, "subscriptionType": "max"}
        path = home / ".claude/.credentials.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"claudeAiOauth": login}))
    url = servers["process"].url
    return {name: one.replace("{url}", url) for name, one in case.process.items()}


def foretold(home: Path, extra: Mapping[str, str]) -> tuple[str, Headers]:
    """Return the address and the two headers of which doctor says that they will be sent."""
    place = Place(environment(home, extra), home / "project", "linux")
    origins = collect(place, home / "machine")
    found = route("claude", origins.layers, login=origins.login)

    def sent(part: Part) -> str | None:
        if not part.what or part.what == "the saved login":
            return part.what and "login"
        scope = next((s for s, file in FILES.items() if part.place == str(home / file)), "process")
        if HEADERS in part.what:
            return value(part.what.partition(" ")[0], scope)
        return value("helper" if part.what == "apiKeyHelper" else part.what, scope)

    bearer, key = sent(found.authorization), sent(found.x_api_key)
    return found.url.rstrip("/"), (f"Bearer {bearer}" if bearer else None, key or None)


def seen(version: str, case: Case) -> tuple[tuple[str, Headers], tuple[str, Headers]]:
    """Return what was foretold, and what the client's first message had."""
    with fresh_home() as home, many_servers() as servers:
        extra = furnish(home.path, case, servers)
        (home.path / "project").mkdir(exist_ok=True)
        under: tuple[str, ...] = ()
        if MANAGED & set(case.settings):
            (home.path / "machine").mkdir()
            machine = Machine(home.path / "machine")
            for name in MANAGED & set(case.settings):
                text = json.dumps(case.settings[name]).replace("{url}", servers[name].url)
                machine.write(FILES[name].removeprefix(ETC), text)
            under = machine.command
        before = foretold(home.path, extra)
        with start_stream(version, home.path, None, extra, ("-p", "ping"), under) as session:
            assert session.pid

            def first() -> tuple[str, dict[str, Any]] | None:
                for one in servers.values():
                    for request in one.requests():
                        # what is not a message, in whichever format, is of somebody whose
                        # server had this port before
                        if request["max_tokens"]:
                            return one.url, request
                return None

            url, request = until(lambda: first() or (), 60, every=0.05)
        return before, (url, (request["authorization"], request["x-api-key"]))


class many_servers:  # noqa: N801, a context as a function is
    """A server for each place that an address may stand in."""

    def __enter__(self) -> Mapping[str, Upstream]:
        self._servers = {scope: Upstream() for scope in (*FILES, "process")}
        for one in self._servers.values():
            one.__enter__()
        return self._servers

    def __exit__(self, *rest: object) -> None:
        for one in self._servers.values():
            one.__exit__(None, None, None)


def check(version: str, cases: Sequence[Case]) -> None:
    """See that each case came as it was foretold; some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for case, (before, after) in zip(
            cases, pool.map(lambda one: seen(version, one), cases), strict=True
        ):
            assert after in (before, unwaited(before)), case


def unwaited(before: tuple[str, Headers]) -> tuple[str, Headers]:
    """
    Return the same where the helper was too slow for the first request.

    With a token beside it the client does not wait for the helper: that request has no x-api-key.
    """
    url, (bearer, key) = before
    late = (bearer or "").startswith("Bearer token") and (key or "").startswith("helper")
    return (url, (bearer, None)) if late else before


def credentials(*, login: bool) -> Iterator[Case]:
    """Yield all combinations of credentials, with the address in the user's settings."""
    for helped, token, key, oauth in itertools.product((False, True), repeat=4):
        if not (helped or token or key or oauth or login):
            continue  # nobody would send anything
        settings: dict[str, Any] = {"env": {ADDRESS: "{url}"}}
        if helped:
            settings["apiKeyHelper"] = helper("user")
        wanted = {TOKEN: token, KEY: key, LOGIN_TOKEN: oauth}
        process = {name: value(name, "process") for name, there in wanted.items() if there}
        yield Case({"user": settings}, process, login)


def scopes() -> Iterator[Case]:
    """Yield every set of places that an address, a helper and a token may stand in."""
    for places in itertools.chain.from_iterable(
        itertools.combinations(OF_USER, size) for size in (1, 2, 3)
    ):
        settings: dict[str, dict[str, Any]] = {one: {"env": {ADDRESS: "{url}"}} for one in places}
        settings[places[0]]["apiKeyHelper"] = helper(places[0])
        yield Case(settings, {ADDRESS: "{url}"})
        settings = {
            one: {
                "apiKeyHelper": helper(one),
                "env": {TOKEN: value(TOKEN, one), KEY: value(KEY, one)},
            }
            for one in places
        }
        yield Case(settings, {ADDRESS: "{url}", TOKEN: value(TOKEN, "process")})


def organisations() -> Iterator[Case]:
    """Yield what an organisation has set, over all that anybody else has."""

    def whole(scope: str) -> dict[str, Any]:
        env = {ADDRESS: "{url}", TOKEN: value(TOKEN, scope), KEY: value(KEY, scope)}
        return {"apiKeyHelper": helper(scope), "env": env}

    mine = {scope: whole(scope) for scope in OF_USER}
    process = {ADDRESS: "{url}", TOKEN: value(TOKEN, "process")}
    theirs = {"apiKeyHelper": helper("managed"), "env": {ADDRESS: "{url}"}}
    yield Case({**mine, "managed": theirs}, process)
    bare = {**theirs, "env": {ADDRESS: "{url}", TOKEN: "", KEY: ""}}
    yield Case({**mine, "managed": bare}, process)
    yield Case({**mine, "managed": whole("managed"), "first drop-in": whole("first drop-in")})
    yield Case({scope: whole(scope) for scope in MANAGED}, process)
    first = {"env": {ADDRESS: "{url}"}}
    last = {"env": {KEY: value(KEY, "last drop-in")}}
    yield Case({"user": whole("user"), "first drop-in": first, "last drop-in": last})
    yield Case({"user": whole("user"), "first drop-in": {"apiKeyHelper": helper("first drop-in")}})


def oddities() -> Iterator[Case]:
    """Yield what is empty, and headers of one's own."""
    user = {"apiKeyHelper": helper("user"), "env": {ADDRESS: "{url}"}}

    def with_env(**env: str) -> dict[str, Any]:
        return {**user, "env": {**user["env"], **env}}  # type: ignore[dict-item]

    both = {TOKEN: value(TOKEN, "process"), KEY: value(KEY, "process")}
    yield Case({"user": with_env(**{TOKEN: "", KEY: ""})}, both)
    own = f"X-Api-Key: {value('x-api-key', 'user')}\nX-Team: a"
    yield Case({"user": with_env(**{HEADERS: own})})
    yield Case({"user": with_env(**{HEADERS: own})}, {TOKEN: value(TOKEN, "process")})
    yield Case({"user": with_env(**{HEADERS: own})}, {HEADERS: "X-Api-Key: another"})
    own = f"Authorization: Bearer {value('authorization', 'user')}"
    yield Case({"user": with_env(**{HEADERS: own})})
    alone = {"env": {ADDRESS: "{url}", HEADERS: own, KEY: value(KEY, "user")}}
    yield Case({"user": alone})
    yield Case({"user": user, "project": {"env": {ADDRESS: "  {url}/ "}}})
    yield Case({"local": {"env": {}}}, {ADDRESS: "{url}", KEY: value(KEY, "process")})


@pytest.mark.servers
@pytest.mark.parametrize("login", [False, True])
def test_credentials_in_all_combinations(login: bool) -> None:
    """A helper, two variables, a token of a login and a saved login: who is sent, and where."""
    check(NEWEST, list(credentials(login=login)))


@pytest.mark.servers
def test_credentials_in_an_older_version() -> None:
    """The same holds for the version that npm installs with Node 20."""
    check(WITH_NODE_20, [one for one in credentials(login=True) if LOGIN_TOKEN not in one.process])


@pytest.mark.servers
def test_places_of_addresses_and_credentials(claude_version: str) -> None:
    """Of several places the one that doctor names counts."""
    places = list(scopes())
    if claude_version == WITH_NODE_20:
        places = places[::2]
    check(claude_version, [*places, *oddities()])


@pytest.mark.servers
def test_what_an_organisation_has_set(claude_version: str) -> None:
    """Its files, in their order, beat all others, and an empty value of theirs takes one away."""
    check(claude_version, list(organisations()))


def formats() -> Iterator[Case]:
    """Yield each provider's format with its address, and what is set beside the helper."""
    more = {
        "BEDROCK": {"AWS_REGION": "us-east-1"},
        "VERTEX": {"ANTHROPIC_VERTEX_PROJECT_ID": "p", "CLOUD_ML_REGION": "us-east5"},
        "ANTHROPIC_AWS": {"ANTHROPIC_AWS_WORKSPACE_ID": "w", "AWS_REGION": "us-east-1"},
        "MANTLE": {"AWS_REGION": "us-east-1"},
        "ANTHROPIC_GOOGLE_CLOUD": {
            "ANTHROPIC_GOOGLE_CLOUD_PROJECT": "p",
            "ANTHROPIC_GOOGLE_CLOUD_LOCATION": "l",
            "ANTHROPIC_GOOGLE_CLOUD_WORKSPACE_ID": "w",
        },
    }
    for mode, address in MODES.items():
        env = {USE + mode: "1", address: "{url}", f"CLAUDE_CODE_SKIP_{mode}_AUTH": "1"}
        settings = {"apiKeyHelper": helper("user"), "env": {**env, **more.get(mode, {})}}
        for process in ({}, {TOKEN: value(TOKEN, "process")}, {KEY: value(KEY, "process")}):
            yield Case({"user": settings}, process)
    off = {USE + mode: "0" for mode in MODES}
    yield Case({"user": {"apiKeyHelper": helper("user"), "env": {ADDRESS: "{url}", **off}}})


@pytest.mark.servers
def test_formats_of_providers() -> None:
    """Each has an address and a way of its own with keys."""
    check(NEWEST, list(formats()))


def layer(scope: str, place: str = "", **more: Any) -> Layer:
    return Layer(scope, place or scope, **more)


def test_what_the_organisation_has_set_beats_all() -> None:
    """The order that was seen with files of the machine, as a table."""
    mine = layer("user", env={ADDRESS: "https://mine"}, helper="mine")
    theirs = layer("managed", env={ADDRESS: "https://theirs"}, helper="theirs")
    found = route("claude", [theirs, mine, layer("process", env={ADDRESS: "https://shell"})])
    assert (found.url, found.helper) == ("https://theirs", theirs)
    assert found.is_helped
    assert found.passed_over == (
        f"{ADDRESS} in user does not count: what the organisation has set beats all others",
        f"{ADDRESS} in process does not count: what the organisation has set beats all others",
    )


def test_a_file_that_is_ignored_has_nothing() -> None:
    """What has a problem does not count."""
    broken = layer("local", env={ADDRESS: "https://local"}, problem="is not strict JSON")
    found = route("claude", [broken, layer("user", env={ADDRESS: "https://user"})])
    assert found.url == "https://user"


def test_an_empty_value_counts() -> None:
    """An empty token in settings takes away that of the terminal, as an address does."""
    token = {TOKEN: Held("1")}
    empty = layer("user", env={ADDRESS: ""}, held={TOKEN: None}, helper="x")
    found = route("claude", [empty, layer("process", env={ADDRESS: "https://shell"}, held=token)])
    assert (found.url, found.url_from) == ("https://api.anthropic.com", empty)
    assert found.authorization.what == "apiKeyHelper"
    assert not route("claude", [replace(empty, held={}), layer("process", held=token)]).is_helped
