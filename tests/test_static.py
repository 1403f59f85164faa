"""A key that somebody else keeps, a placeholder, and the rule for Anthropic's own keys."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile
from keybroker.credential import Lease, Look, Secret
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError, SourceInvalid
from keybroker.pool import Pool
from keybroker.sources import check_hand_out
from tests.contracts import entry
from tests.servers.faults import Faults, Html, refused_url

BASE = "https://llm.example.com"


def profile(base_url: str = BASE, source: dict[str, Any] | None = None, **more: Any) -> Profile:
    return entry(base_url, {"type": "static", **(source or {"key": {"env": "KB_KEY"}})}, **more)


def test_it_gives_what_is_there_now() -> None:
    """The key is read anew each time; its fingerprint is its version, and it has no end."""
    environment = {"KB_KEY": "sk-canary-1"}
    source = sources.build(profile(), environment)
    one = source.issue("")
    environment["KB_KEY"] = "sk-canary-2\n"
    two = source.issue("")
    source.close()
    assert (one.secret, two.secret) == (Secret("sk-canary-1"), Secret("sk-canary-2"))
    assert (one.lease.id, two.lease.id) == (one.secret.fingerprint, two.secret.fingerprint)
    assert one.lease.expires_at is None
    assert not one.lease.revocable


def test_it_follows_a_file_that_is_replaced(tmp_path: Path) -> None:
    """A new file under the same name is the new key."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("sk-canary-1\n")
    source = sources.build(profile(source={"key": {"file": str(path)}}), {})
    assert source.issue("").secret == Secret("sk-canary-1")
    new = tmp_path / "new"
    new.touch(0o600)
    new.write_text("sk-canary-2\n")
    new.rename(path)
    assert source.issue("").secret == Secret("sk-canary-2")
    path.unlink()
    with pytest.raises(ConfigError):
        source.issue("")
    source.close()


def test_it_is_not_ours_to_revoke_or_find() -> None:
    """Whoever keeps it ends it."""
    source = sources.build(profile(), {"KB_KEY": "sk-canary-1"})
    assert (list(source.find("kb")), list(source.sweep("kb"))) == ([], [])
    assert not source.capabilities.revoke
    assert not source.capabilities.find
    with pytest.raises(SourceInvalid):
        source.revoke(Lease("x", "static", datetime.now(UTC)))
    source.close()


def test_it_is_tried_at_the_gateway() -> None:
    """The verdict is the data plane's, and a data plane without a check proves nothing."""
    with DevGateway() as gateway:
        source = sources.build(profile(gateway.url), {})
        assert source.verify(Secret(gateway.master_key)).look is Look.ALIVE
        assert source.verify(Secret("sk-canary-0123456789")).look is Look.REFUSED
        gateway.options.accept_every_key = True
        open_to_all = sources.build(profile(gateway.url), {})
        assert open_to_all.verify(Secret(gateway.master_key)).look is Look.UNVERIFIED
        source.close()
        open_to_all.close()


# Placeholders.


def test_a_placeholder_is_handed_out_as_it_is_and_checked_by_nobody() -> None:
    """Whatever the gateway says about keys, it is there."""
    with DevGateway() as gateway, Faults(gateway.url) as faults:
        source = sources.build(profile(faults.url, {"placeholder": "ollama"}), {})
        assert source.issue("").secret == Secret("ollama")
        assert source.verify(Secret("ollama")).look is Look.UNVERIFIED
        faults.next(Html(502), path="/v1/models")
        assert source.verify(Secret("ollama")).look is Look.UNDECIDED
        source.close()
        assert len(faults.log) == 2


def test_a_placeholder_needs_a_gateway_that_is_there() -> None:
    """Nobody listening is undecided."""
    source = sources.build(profile(refused_url(), {"placeholder": "ollama"}), {})
    assert source.verify(Secret("ollama")).look is Look.UNDECIDED
    source.close()


@pytest.mark.parametrize("value", ["sk-ant-api03-canary", "sk-canary", "Bearer-x", "x" * 65, "ü"])
def test_a_placeholder_that_looks_like_a_key_is_refused(value: str) -> None:
    """A key that was pasted into the file is an error that does not repeat it."""
    with pytest.raises(ConfigError) as caught:
        profile(source={"placeholder": value})
    assert value not in str(caught.value)


@pytest.mark.parametrize("source", [{}, {"key": {"env": "X"}, "placeholder": "ollama"}])
def test_it_is_either_a_key_or_a_placeholder(source: dict[str, Any]) -> None:
    """Neither and both are errors of the file."""
    with pytest.raises(ConfigError):
        entry(BASE, {"type": "static", **source})


# Anthropic's own keys.

OWN = Secret("sk-ant-api03-canary")


@pytest.mark.parametrize(
    "base_url",
    [
        "https://api.anthropic.com",
        "https://API.Anthropic.COM/v1",
        "https://anthropic.com",
        "https://eu.api.anthropic.com:8443",
    ],
)
def test_anthropic_s_key_goes_to_anthropic(base_url: str) -> None:
    """To its own hosts without a question."""
    check_hand_out(OWN, profile(base_url))


@pytest.mark.parametrize(
    "base_url",
    [
        "https://llm.example.com",
        "https://anthropic.com.example.com",
        "https://notanthropic.com",
        "https://api-anthropic.com",
        "https://example.com/api.anthropic.com",
        "https://api.anthropic.com.",
        "http://127.0.0.1:4000",
        "http://localhost",
    ],
)
def test_anthropic_s_key_goes_nowhere_else(base_url: str) -> None:
    """Any other host needs to be meant; the error names host and setting, never the key."""
    with pytest.raises(SourceInvalid) as caught:
        check_hand_out(OWN, profile(base_url))
    said = f"{caught.value.message} {caught.value.hint}"
    assert "canary" not in said
    assert "profiles.work.anthropic_key = true" in said
    assert not caught.value.unknown


def test_anthropic_s_key_goes_where_somebody_meant_it_to() -> None:
    """`anthropic_key` says so, and other keys need no such word."""
    check_hand_out(OWN, profile(anthropic_key=True))
    for other in ("sk-canary", "SK-ANT-canary", "x-sk-ant-canary"):
        check_hand_out(Secret(other), profile())


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    environment = {"KB_OWN": OWN.reveal(), "KB_KEY": "sk-canary-0123456789"}
    pool = Pool(tmp_path, environment, None, {"static": {"KB_OWN", "KB_KEY"}})
    yield pool
    pool.close()


def test_anthropic_s_key_does_not_come_out_of_a_worker(pool: Pool) -> None:
    """The rule holds where a source is read, and lets the key through where it was meant."""
    own = {"key": {"env": "KB_OWN"}}
    with pytest.raises(SourceInvalid) as caught:
        pool.call("static", "poll", 30.0, profile=profile(source=own))
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"
    meant = profile(source=own, anthropic_key=True)
    assert pool.call("static", "poll", 30.0, profile=meant)["credential"]["secret"] == OWN.reveal()
    theirs = profile("https://api.anthropic.com", own)
    assert pool.call("static", "poll", 30.0, profile=theirs)["credential"]["secret"] == OWN.reveal()


def test_a_worker_gives_a_key_and_a_placeholder(pool: Pool) -> None:
    """Both come through the pipe whole."""
    for source, expected in (
        ({"key": {"env": "KB_KEY"}}, "sk-canary-0123456789"),
        ({"placeholder": "ollama"}, "ollama"),
    ):
        answer = pool.call("static", "poll", 30.0, profile=profile(source=source))
        assert answer["credential"]["secret"] == expected
