"""Fixtures shared by all tests. A server that cannot start is an error, never a skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from native.build import compile_helper
from tests.resident import Home as Home
from tests.resident import Resident, fresh_home
from tests.servers import claude
from tests.servers.keyring import Keyring
from tests.servers.litellm import LiteLLM

# A busy machine is no failure, and what was tried before is not kept in the checkout.
settings.register_profile("keybroker", deadline=None, database=None)
settings.load_profile("keybroker")


@pytest.fixture
def home() -> Iterator[Home]:
    """A fresh HOME; nothing of the caller's environment."""
    with fresh_home() as made:
        yield made


@pytest.fixture
def resident(home: Home) -> Iterator[Resident]:
    """A daemon that is not configured or started yet; it is ended with the test."""
    one = Resident(home)
    yield one
    one.stop()


@pytest.fixture(scope="session")
def native_helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The helper in C, compiled as for a wheel."""
    program = compile_helper(tmp_path_factory.mktemp("native"))
    assert program is not None, "no C compiler; type: apt-get install gcc libc6-dev"
    return program


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
