"""Cursor, Fazm and the like: what is to be pasted, and the profile of its own for a pasted key."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from keybroker.config import load
from keybroker.connect import cursor, fazm, opencode
from keybroker.connect.plan import Place
from keybroker.devgateway import DevGateway
from tests.resident import Resident, until
from tests.test_config import read


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def user(resident: Resident, gateway: DevGateway) -> Resident:
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.claude]\n'
        'sonnet = "team-sonnet"\n'
        '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
        'models = ["claude-sonnet-4-5"]\nmax_budget = 50\n'
    )
    return resident


def test_what_is_pasted_into_cursor(user: Resident, gateway: DevGateway) -> None:
    """The address with /v1, the models, and the command for a key, which is not printed itself."""
    status, said, notes = user.cli("connect", "cursor")

    assert status == 0
    assert f"\n  Override OpenAI Base URL  {gateway.url}/v1\n" in said
    assert "\n  Add model                 team-sonnet, claude-sonnet-4-5\n" in said
    [command] = re.findall(r"keybroker (get \S+)", said)
    assert "Cursor's servers make the requests" in notes
    assert "keys of its own that live for 12h, with a budget of 2 each" in notes
    status, key, _ = user.cli(*command.split())
    assert (status, key) == (0, f"{user.key('work-cursor')}\n")
    assert key.strip() not in said
    assert key != user.cli("get")[1]


def test_its_key_is_listed_as_exported(user: Resident) -> None:
    """Short, with a small budget; its hold is a part of a working day."""
    user.cli("connect", "cursor")
    profile = load([user.file], user.environment).profiles["work-cursor"]
    user.cli("get", "work-cursor")

    assert user.row("work-cursor")["exported"] == "pasted by hand"
    assert profile.source["max_budget"] == 2
    assert str(profile.hold) == "4:00:00"
    assert "\n  exported     pasted by hand\n" in user.cli("status")[1]


def test_two_of_them_are_taken_back_one_by_one(user: Resident) -> None:
    """Each has a profile at the end of the same file."""
    before = user.file.read_text()
    user.cli("connect", "opencode")
    user.cli("connect", "cursor")
    user.cli("get", "work-cursor")
    both = set(load([user.file], user.environment).profiles)
    assert user.cli("disconnect", "opencode")[0] == 0
    one = set(load([user.file], user.environment).profiles)
    status, said, _ = user.cli("disconnect", "cursor")

    assert both == {"work", "work-opencode", "work-cursor"}
    assert one == {"work", "work-cursor"}
    assert status == 0
    assert "work-cursor: 1 revoked" in said
    assert user.file.read_text() == before


def test_a_profile_of_its_own_has_none_of_its_own(user: Resident) -> None:
    """One for Cursor is not copied once more."""
    user.cli("connect", "cursor")
    before = user.file.read_text()
    status, said, wrong = user.cli("connect", "cursor", "--profile", "work-cursor")

    assert (status, said, user.file.read_text()) == (78, "", before)
    assert "work-cursor: is already one for a program that runs no helper" in wrong


def test_cursor_changes_no_file_of_cursors(user: Resident) -> None:
    """Only the configuration is another."""
    user.cli("connect", "cursor")
    until(lambda: user.file.exists())

    assert not (user.home.path / ".config/Cursor").exists()
    assert sorted(one.name for one in (user.home.path / ".config").iterdir()) == ["keybroker"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('base_url = "https://llm.example.com"', "https://llm.example.com/v1"),
        ('base_url = "https://llm.example.com/anthropic"', "https://llm.example.com/v1"),
        ('base_url = "https://x.example/llm/anthropic/"', "https://x.example/llm/v1"),
        (
            'base_url = "https://x.example/anthropic"\nopenai_base_url = "https://o.example/api"',
            "https://o.example/api",
        ),
    ],
)
def test_openai_s_clients_get_the_same_gateway(settings: str, expected: str) -> None:
    """What was found when the gateway was looked at counts; else it is never /anthropic."""
    config = read(
        f"[profiles.work]\n{settings}\n[profiles.work.source]\ntype = 'static'\nplaceholder = 'x'\n"
    )
    assert config.profile("work").openai_url == expected


def test_what_is_pasted_into_fazm(user: Resident, gateway: DevGateway) -> None:
    """The whole address; that it gets a placeholder for a key; what goes past the gateway."""
    status, said, notes = user.cli("connect", "fazm")

    assert status == 0
    assert "Settings > Advanced > AI Chat > Custom API Endpoint" in said
    assert f"\n  {gateway.url}\n" in said
    assert "a placeholder as x-api-key" in notes
    assert "Gemini and Codex bypass the gateway" in notes
    assert user.owner() is None


def test_what_fazm_cannot_be_given_is_said() -> None:
    """Headers have no field there."""
    config = read(
        '[profiles.work]\nbase_url = "https://llm.example.com/anthropic"\n'
        'headers = { "X-Route" = "eng" }\n'
        "[profiles.work.source]\ntype = 'static'\nplaceholder = 'x'\n"
    )
    plan = fazm.plan(config.profile("work"), Place.here(), "user")

    assert "the profile's headers cannot be given there" in plan.before
    assert "\n  https://llm.example.com/anthropic\n" in plan.text


@pytest.mark.parametrize("surface", [cursor, fazm, opencode])
def test_they_are_for_one_user(surface: object, user: Resident) -> None:
    """There is nothing of theirs for a project or a machine."""
    assert surface.SCOPES == ("user",)  # type: ignore[attr-defined]
    status, said, wrong = user.cli("connect", "cursor", "--scope", "managed")
    assert (status, said) == (78, "")
    assert "cursor: has no scope managed" in wrong
