"""Fixtures shared by all tests. A server that cannot start is an error, never a skip."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from native.build import compile_helper
from tests.resident import Home as Home
from tests.resident import Resident, fresh_home
from tests.servers import claude
from tests.servers.aws import Aws, allow
from tests.servers.awsfaults import Front
from tests.servers.awsmetadata import Metadata
from tests.servers.cluster import Cluster
from tests.servers.database import Database
from tests.servers.keyring import Keyring
from tests.servers.kubernetes import Kubernetes
from tests.servers.ldap import Ldap
from tests.servers.litellm import LiteLLM
from tests.servers.moto import Moto
from tests.servers.oidc import Oidc
from tests.servers.sso import Sso
from tests.servers.vault import WITH_LDAP, OpenBao

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


@pytest.fixture(scope="session")
def openbao() -> Iterator[OpenBao]:
    """One OpenBao for the whole session; a test that seals or ends it starts its own."""
    with OpenBao() as server:
        yield server


@pytest.fixture(scope="session")
def openbao_tls() -> Iterator[OpenBao]:
    """The same with TLS, for the whole session; its authority is nobody else's."""
    with OpenBao(tls=True) as server:
        yield server


@pytest.fixture(scope="session")
def openbao_with_ldap() -> Iterator[OpenBao]:
    """An OpenBao of the last version that has LDAP, for the whole session."""
    with OpenBao(WITH_LDAP) as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three servers for the whole session: they take ten seconds. What was ended, start again."""
    with Cluster() as servers:
        yield servers


@pytest.fixture(scope="session")
def database(openbao: OpenBao) -> Iterator[Database]:
    """A database with an engine at `openbao`, for the whole session."""
    with Database(openbao) as server:
        yield server


@pytest.fixture(scope="session")
def ldap() -> Iterator[Ldap]:
    """A directory for the whole session; what was stopped, start again."""
    with Ldap() as server:
        yield server


@pytest.fixture(scope="session")
def oidc() -> Iterator[Oidc]:
    """An OpenID provider for the whole session; what was stopped, start again."""
    with Oidc(fronted=True) as server:
        yield server


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    """Whoever reviews service account tokens, for one test."""
    with Kubernetes() as server:
        yield server


@pytest.fixture(scope="session")
def aws() -> Iterator[Aws]:
    """One ministack for the whole session; a test that stops it or sets its clock has its own."""
    with Aws() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """A second opinion on AWS's services, for the whole session."""
    with Moto() as server:
        yield server


@pytest.fixture
def aws_front(aws: Aws) -> Iterator[Front]:
    """A proxy before `aws`, for one test."""
    with Front(aws) as front:
        yield front


@pytest.fixture(scope="session")
def aws_role(aws: Aws) -> str:
    """The ARN of a role that may do everything with secrets."""
    return aws.role(f"role-{secrets.token_hex(4)}", allow("secretsmanager:*"))


@pytest.fixture
def sso(aws: Aws, aws_role: str) -> Iterator[Sso]:
    """Who gives credentials of `aws_role` to a user that is signed in, for one test."""
    name = aws_role.rpartition("/")[2]
    with Sso(lambda: aws.session(aws_role, 3600), aws.account, name) as server:
        yield server


@pytest.fixture
def aws_metadata(aws: Aws, aws_role: str) -> Iterator[Metadata]:
    """Who gives credentials of `aws_role` to whatever runs here, for one test."""
    with Metadata(lambda: aws.session(aws_role, 3600)) as server:
        yield server


@pytest.fixture(params=claude.VERSIONS)
def claude_version(request: pytest.FixtureRequest) -> str:
    """Run a test once with each version of the client."""
    version: str = request.param
    return version
