"""Letting OpenRouter make a key: a page, a code, a key without an end. By a stand-in."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keybroker.cache import find_wrap_key
from keybroker.config import load
from keybroker.document import Where
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.openrouter import OpenRouter as Provider
from keybroker.login.tokens import Store
from keybroker.signin import read_login
from tests.canaries import Canaries
from tests.resident import Resident, until
from tests.servers.browser import Browser, command
from tests.servers.openrouter import OpenRouter
from tests.typed import Signing

BACK = "http://localhost:8711/callback"


@pytest.fixture
def site() -> Iterator[OpenRouter]:
    with OpenRouter() as server:
        yield server


@pytest.fixture
def person(resident: Resident, site: OpenRouter) -> Resident:
    """Somebody who would use OpenRouter, with a browser that says yes."""
    resident.environment["BROWSER"] = command()
    resident.configure(
        f'[logins.router]\ntype = "openrouter"\nurl = "{site.url}"\n'
        f'[profiles.work]\nbase_url = "{site.url}/api"\nverify = "none"\n'
        '[profiles.work.source]\ntype = "login"\nlogin = "router"\npoll = "1s"\n'
    )
    resident.start()
    return resident


@pytest.mark.parametrize("naive", [False, True])
def test_a_person_allows_a_key_once(person: Resident, site: OpenRouter, naive: bool) -> None:
    """However the code is put into the address that is led back to."""
    site.naive = naive
    refused = person.helper()
    done = person.cli("login")

    assert (refused[0], "run: keybroker login router" in refused[2]) == (77, True)
    assert done[:2] == (0, f"Signed in to router as {site.user}.\n"), done
    [key] = site.keys
    assert until(lambda: person.helper()[1]) == f"{key}\n"
    assert site.keys[key] == "keybroker router"
    assert person.cli("whoami") == (0, f"router: {site.user}; without an end\n", "")
    assert person.row()["expires_at"] is None
    [asked] = site.asked
    assert sorted(asked) == ["code", "code_challenge_method", "code_verifier"]


def test_signing_out_says_that_the_key_lives_on(person: Resident, site: OpenRouter) -> None:
    """And where it is deleted, since a key cannot do it itself."""
    assert person.cli("login")[0] == 0
    until(lambda: person.helper()[1])
    status, said, shown = person.cli("logout")

    assert (status, shown) == (0, "")
    assert said == (
        "Signed out of router.\nThe key lives on at OpenRouter, without an end: delete it at "
        f"{site.url}/settings/keys, where it is called keybroker router.\n"
    )
    assert len(site.keys) == 1
    assert until(lambda: person.helper()[0]) == 77


def test_the_key_and_the_code_are_nowhere_but_sealed(person: Resident, site: OpenRouter) -> None:
    canaries = Canaries()
    walker = Browser()
    with Signing(person, ("--no-browser",)) as signing:
        page = walker.open(signing.url())
        status, said, shown = signing.ended()
    assert status == 0, shown
    sign_in = load([person.file], person.environment).logins["router"]
    wrap = find_wrap_key("file", person.state, person.environment).key
    kept = Store(person.state, wrap).load(sign_in)
    assert kept is not None
    key = canaries.know("key", kept.access.reveal())
    canaries.know("code", site.asked[0]["code"])
    canaries.know("verifier", site.asked[0]["code_verifier"])
    until(lambda: person.key() == key)
    person.stop()

    assert page.url.endswith("/callback/signed-in")
    assert canaries.seen_in(page.text + said + shown) == []
    assert canaries.below(person.home.path) == []


def test_an_address_is_pasted_from_a_browser_elsewhere(person: Resident, site: OpenRouter) -> None:
    """That of an older sign-in is not taken, though it has a code of ours."""
    with Signing(person, ("--no-browser",)) as signing:
        old = Browser(before="http://localhost").open(signing.url()).url
    with Signing(person, ("--no-browser",)) as signing:
        right = Browser(before="http://localhost").open(signing.url()).url
        port = right.split(":")[2].partition("/")[0]
        moved = old.replace(old.split(":")[2].partition("/")[0], port)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(moved)
        refused.value.close()
        signing.paste(right)
        status, _, shown = signing.ended()

    assert refused.value.code == 404
    assert (status, len(site.keys)) == (0, 1), shown


@pytest.mark.parametrize(
    ("breaks", "kind", "words"),
    [
        ((403, b'{"error":{"code":403}}'), SourceDenied, "does not take the code (403)"),
        ((400, b"{}"), SourceDenied, "does not take the code (400)"),
        ((500, b"<html>"), SourceUnavailable, "failed to make a key (500)"),
        ((429, b""), SourceUnavailable, "failed to make a key (429)"),
        ((405, b""), SourceInvalid, "failed to make a key (405)"),
        ((200, b"<html>"), SourceInvalid, "the key is empty"),
        ((200, b'{"key": "sk or v1"}'), SourceInvalid, "the key is not one token"),
        ((200, b'{"key": ["x"]}'), SourceInvalid, "the key is empty"),
    ],
)
def test_what_is_no_key_is_said(
    site: OpenRouter, breaks: tuple[int, bytes], kind: type[KeybrokerError], words: str
) -> None:
    """In words of ours; the code is not in them."""
    site.breaks = breaks
    sign_in = read_login("router", {"type": "openrouter", "url": site.url}, Where({}, "test"))
    with closing(Provider(sign_in, {})) as provider:
        visit = provider.browser(BACK)
        with pytest.raises(KeybrokerError) as caught:
            visit.redeem({"state": visit.state, "code": "the-code-that-is-secret"})

    assert type(caught.value) is kind
    assert words in caught.value.message
    assert "the-code" not in f"{caught.value.message}{caught.value.hint}"


def test_its_key_makes_no_keys_at_litellm(tmp_path: Path) -> None:
    """It is one itself."""
    file = tmp_path / "config.toml"
    file.write_text(
        '[logins.router]\ntype = "openrouter"\n[profiles.work]\nbase_url = "https://llm.example"\n'
        '[profiles.work.source]\ntype = "litellm"\nlogin = "router"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load((file,), {})
    assert caught.value.message.startswith(
        f"{file}:7: profiles.work.source.login: a key of OpenRouter's makes no keys at LiteLLM"
    )


def test_a_code_is_good_once_and_for_whoever_began(site: OpenRouter) -> None:
    """Who picks a code up has not the verifier; nor has another sign-in."""
    sign_in = read_login("router", {"type": "openrouter", "url": site.url}, Where({}, "test"))
    with closing(Provider(sign_in, {})) as provider:
        first, second = provider.browser(BACK), provider.browser(BACK)
        stolen = Browser(before="http://localhost").open(first.url).url
        with pytest.raises(SourceDenied):
            second.redeem({"code": stolen.partition("code=")[2]})
        own = Browser(before="http://localhost").open(first.url).url.partition("code=")[2]
        given = first.redeem({"code": own})
        with pytest.raises(SourceDenied):
            first.redeem({"code": own})

    assert first.state != second.state
    assert [*site.keys] == [given.access.reveal()]
    assert given.standing.access_ends is None
    assert given.refresh is None
