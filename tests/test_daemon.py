"""The daemon as a process: it answers, rotates, reloads and ends; commands go through it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from keybroker.devgateway import DevGateway
from tests.resident import Resident


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def running(resident: Resident, gateway: DevGateway) -> Resident:
    """A daemon with one profile of the gateway."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        'type = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    resident.start()
    return resident


def test_a_key_is_ready_before_it_is_asked_for(running: Resident, gateway: DevGateway) -> None:
    """It is minted at the start; every way to ask gives the same one."""
    key = running.key()

    assert running.helper() == (0, f"{key}\n", "")
    assert running.cli("get", "work") == (0, f"{key}\n", "")
    assert len(gateway.live_keys()) == 1
