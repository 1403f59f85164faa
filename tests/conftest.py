"""Fixtures shared by all tests. A server that cannot start is an error, never a skip."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.resident import Home as Home
from tests.resident import Resident
from tests.servers import claude
from tests.servers.keyring import Keyring
from tests.servers.litellm import LiteLLM

# A busy machine is no failure, and what was tried before is not kept in the checkout.
settings.register_profile("keybroker", deadline=None, database=None)
settings.load_profile("keybroker")


@pytest.fixture
def home() -> Iterator[Home]:
    """A fresh HOME with every XDG folder below it; nothing of the caller's environment."""
    with tempfile.TemporaryDirectory(prefix="kb-", ignore_cleanup_errors=True) as temporary:
        path = Path(temporary)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "HOME": str(path),
            "LANG": "C.UTF-8",
        }
        for name, below in {
            "XDG_CONFIG_HOME": ".config",
            "XDG_DATA_HOME": ".local/share",
            "XDG_STATE_HOME": ".local/state",
            "XDG_CACHE_HOME": ".cache",
            "XDG_RUNTIME_DIR": "run",
        }.items():
            (path / below).mkdir(mode=0o700, parents=True)
            environment[name] = str(path / below)
        yield Home(path, environment)


@pytest.fixture
def resident(home: Home) -> Iterator[Resident]:
    """A daemon that is not configured or started yet; it is ended with the test."""
    one = Resident(home)
    yield one
    one.stop()


@pytest.fixture(scope="session")
def litellm() -> Iterator[LiteLLM]:
    """One LiteLLM for the whole session. Its keys, logs and rows are those of all tests."""
    with LiteLLM() as server:
        yield server


@pytest.fixture(scope="session")
def keyring_session() -> Iterator[Keyring]:
    """An unlocked keyring for the whole session; a test that locks it starts its own."""
    with Keyring() as keyring:
        yield keyring


@pytest.fixture(params=claude.VERSIONS)
def claude_version(request: pytest.FixtureRequest) -> str:
    """Run a test once with each version of the client."""
    version: str = request.param
    return version
