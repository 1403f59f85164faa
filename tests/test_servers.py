"""The test servers are what the other tests take them for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore import UNSIGNED, auth
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from tests.conftest import Home
from tests.servers.agent import Agent
from tests.servers.authority import Authority
from tests.servers.aws import Aws, Keys, allow, connect, statement
from tests.servers.awsfaults import Dated, Delay, Front, refusal
from tests.servers.awslogin import (
    ACCESS_KEY,
    SECRET_KEY,
    SERVER_ID_HEADER,
    AwsLogin,
    signature,
)
from tests.servers.awsmetadata import Metadata
from tests.servers.claude import run_claude, start_stream
from tests.servers.cluster import Cluster
from tests.servers.database import Database
from tests.servers.faults import (
    CommitThenDrop,
    Fault,
    GarbageJson,
    Hang,
    Html,
    Redirect,
    Reset,
    Status,
    Truncated,
)
from tests.servers.keyring import Keyring
from tests.servers.kubernetes import Kubernetes
from tests.servers.ldap import Ldap
from tests.servers.litellm import UPSTREAM_KEY, LiteLLM
from tests.servers.moto import Moto
from tests.servers.oidc import Oidc
from tests.servers.processes import wait_until
from tests.servers.signer import Signer
from tests.servers.sso import Sso
from tests.servers.vault import WITH_LDAP, OpenBao
from tests.servers.vaultapi import Api, Kv

pytestmark = pytest.mark.servers


def call(
    url: str, path: str, key: str, body: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """POST a body, or GET; returns the status and the answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def new_key(litellm: LiteLLM, alias: str) -> str:
    """Mint a key that lives for an hour."""
    request = {"key_alias": alias, "duration": "1h", "key_type": "llm_api"}
    status, answer = call(litellm.url, "/key/generate", litellm.master_key, request)
    assert status == 200
    key: str = answer["key"]
    return key


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def helper_settings(url: str, key_file: Path) -> dict[str, Any]:
    """Settings of a client whose helper prints a file."""
    return {"apiKeyHelper": f"cat {key_file}", "env": {"ANTHROPIC_BASE_URL": url}}


def test_a_key_is_a_row_until_it_is_deleted(litellm: LiteLLM) -> None:
    """A new key opens /v1/models and is a row; a deleted one is refused and remembered."""
    key = new_key(litellm, "a-row")

    [row] = [row for row in litellm.key_rows() if row["token"] == sha256(key)]
    left = row["expires"] - datetime.now(UTC)
    opened, _ = call(litellm.url, "/v1/models", key)
    deleted, _ = call(litellm.url, "/key/delete", litellm.master_key, {"keys": [key]})
    refused, answer = call(litellm.url, "/v1/models", key)

    assert row["key_alias"] == "a-row"
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert (opened, deleted, refused) == (200, 200, 401)
    assert answer["error"]["type"] == "token_not_found_in_db"
    assert sha256(key) not in {row["token"] for row in litellm.key_rows()}
    assert sha256(key) in {row["token"] for row in litellm.deleted_key_rows()}


def test_requests_are_recorded_with_the_key_presented(litellm: LiteLLM) -> None:
    """The log names method, path, status, times and the key, for refused keys too."""
    before = datetime.now(UTC)

    key = "sk-nobody-has-minted-this"

    call(litellm.url, "/v1/models", key)

    [seen] = [r for r in litellm.request_log() if r.key_sha256 == sha256(key)]
    assert (seen.method, seen.path, seen.status) == ("GET", "/v1/models", 401)
    assert seen.finished
    assert before <= seen.started <= seen.finished <= datetime.now(UTC)


def test_messages_reach_the_upstream_with_the_gateway_s_own_key(litellm: LiteLLM) -> None:
    """A virtual key stays at the gateway."""
    key = new_key(litellm, "upstream")
    message = {"role": "user", "content": "ping"}
    request = {"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [message]}

    status, answer = call(litellm.url, "/v1/messages", key, request)

    assert (status, answer["content"][0]["text"]) == (200, "pong")
    assert {r["x-api-key"] for r in litellm.upstream.requests()} == {UPSTREAM_KEY}


def test_an_outage_of_the_database_is_503_for_a_new_key(litellm: LiteLLM) -> None:
    """The proxy cannot look up a key it has not seen, and recovers by itself."""
    with litellm.outage():
        during, _ = call(litellm.url, "/v1/models", "sk-not-seen-before-the-outage")
    after, _ = call(litellm.url, "/v1/models", new_key(litellm, "after-the-outage"))

    assert (during, after) == (503, 200)


def test_the_client_gets_an_answer_through_the_gateway(
    litellm: LiteLLM, home: Home, claude_version: str
) -> None:
    """Claude Code asks its helper for the key and prints what the gateway passes on."""
    key_file = home.path / "key"
    key_file.write_text(new_key(litellm, f"client-{claude_version}"))

    result = run_claude(claude_version, home.path, helper_settings(litellm.url, key_file))

    assert (result.rc, result.stdout, result.stderr) == (0, "pong\n", "")


def test_a_running_client_takes_a_new_key(
    litellm: LiteLLM, home: Home, claude_version: str
) -> None:
    """A deleted key is refused once; the client asks its helper again and goes on."""
    old, new = (new_key(litellm, f"{name}-{claude_version}") for name in ("old", "new"))
    key_file = home.path / "key"
    key_file.write_text(old)
    settings = helper_settings(litellm.url, key_file)

    with start_stream(claude_version, home.path, settings) as session:
        first = session.ask("ping")
        key_file.write_text(new)
        call(litellm.url, "/key/delete", litellm.master_key, {"keys": [old]})
        second = session.ask("ping again")

    names = {sha256(old): "old", sha256(new): "new"}
    seen = [
        (names[r.key_sha256], r.status)
        for r in litellm.request_log()
        if r.key_sha256 in names and r.path.startswith("/v1/messages")
    ]
    assert (first["result"], second["result"]) == ("pong", "pong")
    assert seen[0] == ("old", 200)
    assert seen[-1] == ("new", 200)
    assert ("old", 401) in seen


def in_keyring(keyring: Keyring, home: Home, program: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the keyring's bus."""
    return subprocess.run(
        [sys.executable, "-c", f"import keyring; {program}"],
        env={**home.environment, **keyring.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_keyring_keeps_what_is_stored(keyring_session: Keyring, home: Home) -> None:
    """A second process reads what the first stored, through the Secret Service."""
    stored = in_keyring(keyring_session, home, "keyring.set_password('kb-test', 'me', 'wrapped')")
    read = in_keyring(
        keyring_session,
        home,
        "print(keyring.get_keyring().__module__, keyring.get_password('kb-test', 'me'))",
    )

    assert (stored.returncode, stored.stderr) == (0, "")
    assert (read.stdout, read.stderr) == ("keyring.backends.SecretService wrapped\n", "")


def test_a_locked_keyring_refuses(home: Home) -> None:
    """Nobody can answer a dialog here: a locked keyring is an error at once."""
    store = "keyring.set_password('kb-test', 'me', 'wrapped')"
    read = "print(keyring.get_password('kb-test', 'me'))"
    with Keyring() as keyring:
        in_keyring(keyring, home, store)
        keyring.lock()
        locked = in_keyring(keyring, home, read)
        keyring.unlock()
        unlocked = in_keyring(keyring, home, read)

    assert locked.returncode == 1
    assert "KeyringLocked" in locked.stderr
    assert unlocked.stdout == "wrapped\n"


def test_a_dialog_that_nobody_answers_blocks_the_reader(home: Home) -> None:
    """A keyring with a dialog keeps its reader waiting as long as the dialog is open."""
    with Keyring(locked=True) as keyring, keyring.nobody_at_the_dialog() as dialog:
        read = subprocess.Popen(
            [sys.executable, "-c", "import keyring; keyring.get_password('kb-test', 'me')"],
            env={**home.environment, **keyring.environment},
        )
        asked = wait_until(lambda: "BeginPrompting" in dialog.tail(), 30)
        waiting = read.poll() is None
        read.kill()
        read.wait()

    assert (asked, waiting) == (True, True)


def log_in(api: Api, path: str, **body: Any) -> int:
    """Log in without a token; returns the status. A token that is given has to be one."""
    status, answer = api.request("POST", path, body, token="")
    if status == 200:
        token = answer["auth"]["client_token"]
        assert api.request("GET", "auth/token/lookup-self", token=token)[0] == 200
    return status


def listens(url: str) -> bool:
    """Whether somebody listens at an address."""
    host, _, port = url.rpartition("//")[2].rpartition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def reader(bao: OpenBao, kv: Kv, name: str) -> str:
    """A policy that may read one secret."""
    return bao.policy(f"read-{kv.mount}", {kv.path(name): ["read"]})


def test_an_openbao_is_ours_and_ends() -> None:
    """It says its own name, and nobody listens once it has ended."""
    with OpenBao() as bao:
        name = bao.health()["cluster_name"]

    assert name == bao.mark
    assert not bao.alive()
    assert not listens(bao.url)


def test_openbao_keeps_versions_and_records_who_asked(openbao: OpenBao) -> None:
    """Each read is one entry of the audit log, which holds no secret."""
    kv = openbao.kv()
    versions = kv.put("llm", key="sk-one"), kv.put("llm", key="sk-two")
    read = [openbao.request("GET", kv.path("llm"))]
    kv.delete("llm")
    read.append(openbao.request("GET", kv.path("llm")))
    kv.undelete("llm", 2)
    kv.destroy("llm", 1)
    read.append(openbao.request("GET", kv.path("llm") + "?version=1"))

    assert versions == (1, 2)
    assert read[0][1]["data"]["data"] == {"key": "sk-two"}
    assert [status for status, _ in read] == [200, 404, 404]
    assert openbao.count(kv.path("llm"), "read") == 3
    assert "sk-one" not in openbao.audit.read_text()


def test_openbao_logs_in_and_says_what_one_may(openbao: OpenBao) -> None:
    """A token of an AppRole reads what its policy says and nothing else."""
    kv = openbao.kv(version=1)
    kv.put("llm", key="sk-one", ttl="30s")
    role_id, secret_id = openbao.approle("servers", [reader(openbao, kv, "llm")], kv.mount)

    login = {"role_id": role_id, "secret_id": secret_id}
    _, answer = openbao.request("POST", f"auth/{kv.mount}/login", login, token="")
    token = answer["auth"]["client_token"]
    allowed = openbao.request("GET", kv.path("llm"), token=token)
    denied, _ = openbao.request("GET", kv.path("other"), token=token)

    assert (allowed[0], allowed[1]["lease_duration"], denied) == (200, 30, 403)
    assert openbao.count(f"auth/{kv.mount}/login") == 1


def test_a_sealed_openbao_has_its_data_afterwards() -> None:
    """It answers 503 while it is sealed."""
    with OpenBao() as bao:
        kv = bao.kv()
        kv.put("llm", key="sk-one")
        bao.seal()
        sealed, _ = bao.request("GET", kv.path("llm"))
        bao.unseal()
        unsealed, _ = bao.request("GET", kv.path("llm"))

    assert (sealed, unsealed) == (503, 200)


def test_an_openbao_that_hangs_is_silent_and_goes_on() -> None:
    """It takes connections all the while."""
    with OpenBao() as bao:
        bao.pause()
        silent, open_ = bao.health(patience=0.3), listens(bao.url)
        bao.resume()
        again = bao.health()

    assert (silent, open_, again["cluster_name"]) == ({}, True, bao.mark)


@pytest.mark.parametrize("says_when", [True, False])
def test_a_rate_limit_says_when_to_come_back(openbao: OpenBao, says_when: bool) -> None:
    """Or it does not, as servers are delivered."""
    kv = openbao.kv()
    kv.put("llm", key="sk-one")
    openbao.rate_limit(kv.mount, kv.mount, interval="9s", block="5s", headers=says_when)
    answers = [openbao.ask("GET", kv.path("llm")) for _ in range(3)]
    openbao.end_rate_limit(kv.mount)

    assert [answer.status for answer in answers] == [200, 429, 429]
    assert ("retry-after" in answers[1].headers) == says_when
    assert openbao.count(kv.path("llm"), "read") == 3


def test_a_namespace_is_a_server_of_its_own(openbao: OpenBao) -> None:
    """What is mounted in it is nowhere else."""
    team = openbao.namespace("team-servers")
    openbao.do("POST", "sys/mounts/its-own", {"type": "kv"}, namespace=team)

    inside = openbao.do("GET", "sys/mounts", namespace=team)["data"]
    outside = openbao.do("GET", "sys/mounts")["data"]

    assert ("its-own/" in inside, "its-own/" in outside) == (True, False)


def test_tls_is_of_a_private_authority_and_knows_clients(
    openbao_tls: OpenBao, tmp_path: Path
) -> None:
    """A client's certificate logs in; a client that does not know the authority stays away."""
    path = openbao_tls.cert("servers", ["default"], openbao_tls.authority)
    certificate = openbao_tls.authority.client("servers")

    with_one = openbao_tls.ask("POST", path, token="", certificate=certificate)
    without, _ = openbao_tls.request("POST", path, token="")
    with pytest.raises(ssl.SSLCertVerificationError):
        Api(openbao_tls.url, ca_file=Authority(tmp_path).file).request("GET", "sys/health")

    assert (with_one.status, without) == (200, 400)


def test_another_server_leads_when_the_leader_is_killed(cluster: Cluster) -> None:
    """What was written stays; the one that was killed comes back and stands by."""
    leader = cluster.leader()
    kv = leader.kv()
    kv.put("llm", key="sk-one")
    cluster.wait_for_standbys(kv.path("llm"))
    told = {"X-Vault-No-Request-Forwarding": "true"}
    redirect = cluster.standbys()[0].ask("DELETE", kv.path("llm"), headers=told)

    leader.kill()
    other = cluster.wait_for_leader()
    read = other.do("GET", kv.path("llm"))["data"]["data"]
    leader.start()
    leader.wait_until_ours()

    assert (redirect.status, redirect.headers["location"][: len(leader.url)]) == (307, leader.url)
    assert read == {"key": "sk-one"}
    assert cluster.leader() is other
    assert len(cluster.standbys()) == 2


def test_a_cluster_of_one_keeps_its_data_over_an_outage() -> None:
    """Nobody listens in between, nor afterwards."""
    with Cluster(1) as cluster:
        [server] = cluster.nodes
        server.kv("secret").put("llm", key="sk-one")
        server.stop()
        open_ = listens(server.url)
        server.start()
        cluster.wait_for_leader()
        found = server.do("GET", "secret/data/llm")["data"]["data"]

    assert (open_, found) == (False, {"key": "sk-one"})
    assert not server.alive()
    assert not listens(server.url)


@pytest.mark.parametrize("proxy", [False, True])
def test_the_socket_of_an_agent_is_its_owner_s_alone(openbao: OpenBao, proxy: bool) -> None:
    """Whatever the umask is: who may connect is somebody, to the server."""
    kv = openbao.kv()
    login = openbao.approle("agent", [reader(openbao, kv, "llm")], kv.mount)
    before = os.umask(0)
    try:
        with Agent(openbao, *login, mount=kv.mount, proxy=proxy) as agent:
            found = agent.socket.stat()
    finally:
        os.umask(before)

    assert (found.st_mode & 0o777, found.st_uid) == (0o600, os.getuid())


@pytest.mark.parametrize("proxy", [False, True])
def test_an_agent_asks_for_whoever_has_no_token(openbao: OpenBao, proxy: bool) -> None:
    """It has logged in once, passes reads on, and renders what it is told to."""
    kv = openbao.kv()
    kv.put("llm", key="sk-one")
    login = openbao.approle("agent", [reader(openbao, kv, "llm")], kv.mount)
    key = f'{{{{ with secret "{kv.path("llm")}" }}}}{{{{ .Data.data.key }}}}{{{{ end }}}}'
    templates = {} if proxy else {"key": key}

    with Agent(openbao, *login, mount=kv.mount, templates=templates, proxy=proxy) as agent:
        read = agent.do("GET", kv.path("llm"))["data"]["data"]
        rendered = {name: agent.rendered(name) for name in templates}
        is_socket = agent.socket.is_socket()

    assert read == {"key": "sk-one"}
    assert rendered == ({} if proxy else {"key": "sk-one"})
    assert is_socket
    assert openbao.count(f"auth/{kv.mount}/login") == 1
    assert not listens(agent.url)


def test_a_database_user_ends_with_its_lease(openbao: OpenBao, database: Database) -> None:
    """PostgreSQL takes its password until then, and no other."""
    path = database.dynamic_role("llm", "1m", "2m")
    lease = openbao.do("GET", path)
    user = lease["data"]

    before = database.logs_in(**user), database.logs_in(user["username"], "another")
    leases = openbao.leases(path)
    openbao.do("POST", "sys/leases/revoke", {"lease_id": lease["lease_id"], "sync": True})

    assert (before, leases) == ((True, False), [lease["lease_id"]])
    assert not database.logs_in(**user)
    assert user["username"] not in database.users()
    assert openbao.leases(path) == []


def test_a_static_role_has_one_password_after_the_other(
    openbao: OpenBao, database: Database
) -> None:
    """The user stays, and there is no lease."""
    path = database.static_role("bot", "1h")
    old = openbao.do("GET", path)
    database.rotate("bot")
    new = openbao.do("GET", path)

    opened = [database.logs_in("bot", answer["data"]["password"]) for answer in (old, new)]
    assert opened == [False, True]
    assert (new["lease_id"], 3590 < new["data"]["ttl"] <= 3600) == ("", True)


def test_a_database_that_is_down_is_an_error_of_the_server(
    openbao: OpenBao, database: Database
) -> None:
    """The engine recovers by itself."""
    path = database.dynamic_role("outage")
    database.stop()
    during, _ = openbao.request("GET", path)
    database.start()
    after, _ = openbao.request("GET", path)

    assert (during, after) == (500, 200)


def test_a_directory_that_is_down_looks_like_a_wrong_password(
    openbao_with_ldap: OpenBao, ldap: Ldap
) -> None:
    """Both are 400; only the text differs."""
    path = ldap.enable(openbao_with_ldap, ["default"])
    right = log_in(openbao_with_ldap, path, password=ldap.password)
    wrong = log_in(openbao_with_ldap, path, password="another")
    ldap.stop()
    down = log_in(openbao_with_ldap, path, password=ldap.password)
    ldap.start()
    again = log_in(openbao_with_ldap, path, password=ldap.password)

    assert (right, wrong, down, again) == (200, 400, 400, 200)
    assert openbao_with_ldap.health()["version"] == WITH_LDAP


def test_kubernetes_reviews_what_it_has_signed(openbao: OpenBao, kubernetes: Kubernetes) -> None:
    """A refusal, another account and an outage are all 403."""
    path = kubernetes.enable(openbao, "servers", ["default"], "runner")
    token, other = map(kubernetes.service_account_token, ("runner", "other"))

    def answer(jwt: str) -> int:
        return log_in(openbao, path, role="servers", jwt=jwt)

    told = [answer(token), answer(other), answer(token[:-8] + "AAAAAAAA")]
    kubernetes.refuses = True
    told.append(answer(token))
    kubernetes.refuses, kubernetes.is_down = False, True
    told.append(answer(token))
    kubernetes.is_down = False
    told.append(answer(token))

    assert told == [200, 403, 403, 403, 403, 200]


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
def test_a_signed_token_logs_in_while_it_is_valid(openbao: OpenBao, algorithm: str) -> None:
    """Late, early, for another, or signed by another: 400."""
    signer = Signer(algorithm=algorithm)
    config = {"jwt_validation_pubkeys": [signer.public_key]}
    mount = f"jwt-{algorithm.lower()}"
    path = openbao.jwt("servers", ["default"], "vault", mount, config=config)
    tokens = [
        signer.token("me", "vault"),
        signer.token("me", "vault", seconds=-300),
        signer.token("me", "vault", seconds=900, early=600),
        signer.token("me", "another"),
        Signer(algorithm=algorithm).token("me", "vault"),
    ]

    answers = [log_in(openbao, path, role="servers", jwt=token) for token in tokens]

    assert answers == [200, 400, 400, 400, 400]
    assert [bool(signer.claims(token)) for token in tokens] == [True, False, True, True, False]


def test_a_provider_s_token_logs_in_by_discovery(openbao: OpenBao, oidc: Oidc) -> None:
    """If it is for this server."""
    config = {"oidc_discovery_url": oidc.issuer, "bound_issuer": oidc.issuer}
    path = openbao.jwt("servers", ["default"], oidc.audience, "jwt-oidc", config=config)

    ours = log_in(openbao, path, role="servers", jwt=oidc.token())
    another = log_in(openbao, path, role="servers", jwt=oidc.token("https://another.example"))

    assert (ours, another) == (200, 400)


def test_signatures_are_those_of_aws() -> None:
    """The first of the examples that AWS publishes."""
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    headers = {"host": "example.amazonaws.com", "x-amz-date": "20150830T123600Z"}
    scope = "20150830/us-east-1/service/aws4_request"
    url = "https://example.amazonaws.com/"

    made = signature(secret, scope, "GET", url, headers, sorted(headers), b"")

    assert made == "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"


def signed_identity(secret: str = SECRET_KEY, **headers: str) -> dict[str, str]:
    """A request that says who signed it, as a login at Vault takes it."""
    url, body = "https://sts.amazonaws.com/", b"Action=GetCallerIdentity&Version=2011-06-15"
    now = datetime.now(UTC)
    scope = f"{now:%Y%m%d}/us-east-1/sts/aws4_request"
    sent = {"host": "sts.amazonaws.com", "x-amz-date": f"{now:%Y%m%dT%H%M%SZ}", **headers}
    names = sorted(sent)
    made = signature(secret, scope, "POST", url, sent, names, body)
    who = f"Credential={ACCESS_KEY}/{scope}, SignedHeaders={';'.join(names)}"
    sent["authorization"] = f"AWS4-HMAC-SHA256 {who}, Signature={made}"
    parts = {"url": url.encode(), "body": body, "headers": json.dumps(sent).encode()}
    return {"iam_http_request_method": "POST"} | {
        f"iam_request_{name}": base64.b64encode(part).decode() for name, part in parts.items()
    }


def test_aws_s_signature_logs_in(openbao: OpenBao) -> None:
    """A wrong key, a role that is not there and an unsigned server's name do not."""
    kv = openbao.kv()
    kv.put("llm", key="sk-one")
    named = {SERVER_ID_HEADER.lower(): "vault.example"}
    with AwsLogin(openbao, server_id="vault.example") as server:
        front = Api(server.url, openbao.token)
        path = server.role("servers", ["default"], ttl="1m")
        answers = [
            log_in(front, path, role="servers", **signed_identity(**named)),
            log_in(front, path, role="servers", **signed_identity("another", **named)),
            log_in(front, path, role="another", **signed_identity(**named)),
            log_in(front, path, role="servers", **signed_identity()),
        ]
        behind = front.do("GET", kv.path("llm"))["data"]["data"]

    assert answers == [200, 400, 400, 400]
    assert server.logins == 4
    assert behind == {"key": "sk-one"}


def said(call: Callable[..., Any], **asked: Any) -> tuple[int, str]:
    """What AWS's services answer: the status, and the code of a refusal."""
    try:
        return call(**asked)["ResponseMetadata"]["HTTPStatusCode"], ""
    except ClientError as refused:
        answer = refused.response
        return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def own(name: str) -> str:
    """A name that no other test has."""
    return f"{name}-{secrets.token_hex(4)}"


def token() -> str:
    """What makes a write of a secret the same as another."""
    return str(uuid.uuid4())


def test_aws_knows_versions_by_their_labels(aws: Aws) -> None:
    """A pending value is another version, which has the id that was asked for."""
    name, pending = own("labels"), token()
    first = aws.put(name, "sk-one")
    made = aws.put(name, "sk-two", ClientRequestToken=pending, VersionStages=["AWSPENDING"])

    listed = aws.client("secretsmanager").list_secret_version_ids(SecretId=name)["Versions"]

    assert made == pending
    assert aws.labels(name) == {"AWSCURRENT": first, "AWSPENDING": pending}
    assert {one["VersionId"]: one["VersionStages"] for one in listed} == {
        first: ["AWSCURRENT"],
        pending: ["AWSPENDING"],
    }
    assert (aws.value(name), aws.value(name, "AWSPENDING")) == ("sk-one", "sk-two")


def test_aws_moves_a_label_only_from_where_it_is(aws: Aws) -> None:
    """Of two that move AWSCURRENT, the second is refused. The new version stays pending too."""
    name, pending, other = own("moves"), token(), token()
    first = aws.put(name, "sk-one")
    for one in (pending, other):
        aws.put(name, "sk-two", ClientRequestToken=one, VersionStages=["AWSPENDING"])
    move = aws.client("secretsmanager").update_secret_version_stage
    asked = {"SecretId": name, "VersionStage": "AWSCURRENT", "MoveToVersionId": pending}

    blind = said(move, **asked)
    wrong = said(move, **asked, RemoveFromVersionId=other)
    unknown = said(move, **asked, RemoveFromVersionId=token())
    right = said(move, **asked, RemoveFromVersionId=first)
    late = said(move, **asked | {"MoveToVersionId": other}, RemoveFromVersionId=first)
    again = said(move, **asked, RemoveFromVersionId=first)
    nothing_to_do = said(move, **asked)

    assert blind == wrong == late == again == (400, "InvalidParameterException")
    assert unknown == (400, "ResourceNotFoundException")
    assert right == nothing_to_do == (200, "")
    assert aws.value(name) == "sk-two"
    versions = aws.secret(name)["VersionIdsToStages"]
    assert versions[first] == ["AWSPREVIOUS"]
    assert set(versions[pending]) == {"AWSCURRENT", "AWSPENDING"}


def test_aws_lets_one_of_many_move_a_label(aws: Aws, aws_front: Front) -> None:
    """However many see the same version as current."""
    name = own("race")
    first = aws.put(name, "sk-0")
    manager = connect("secretsmanager", aws_front.url, aws.root)
    put = partial(manager.put_secret_value, SecretId=name, VersionStages=["AWSPENDING"])
    versions = [put(SecretString=f"sk-{number}")["VersionId"] for number in range(1, 7)]
    asked = {"SecretId": name, "VersionStage": "AWSCURRENT", "RemoveFromVersionId": first}

    def move(version: str) -> tuple[int, str]:
        return said(manager.update_secret_version_stage, **asked, MoveToVersionId=version)

    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(move, versions))

    assert sorted(answers) == [(200, ""), *[(400, "InvalidParameterException")] * 5]
    assert aws.labels(name)["AWSCURRENT"] == versions[answers.index((200, ""))]
    assert aws.labels(name)["AWSPREVIOUS"] == first


@pytest.mark.parametrize("corrected", [True, False])
def test_aws_and_a_version_that_is_written_twice(
    aws: Aws, aws_front: Front, corrected: bool
) -> None:
    """AWS ignores the same value and refuses another; ministack overwrites."""
    name, known = own("twice"), token()
    aws.put(name, "sk-one")
    manager = connect("secretsmanager", aws_front.url if corrected else aws.url, aws.root)
    asked = {"SecretId": name, "ClientRequestToken": known, "VersionStages": ["AWSPENDING"]}
    put = partial(manager.put_secret_value, **asked)

    answers = [said(put, SecretString=value) for value in ("sk-two", "sk-two", "sk-three")]
    value = aws.value(name, "AWSPENDING")
    answers.append(said(put, SecretBinary=b"sk-two"))

    refused = (400, "ResourceExistsException") if corrected else (200, "")
    assert answers == [(200, ""), (200, ""), refused, refused]
    assert value == ("sk-two" if corrected else "sk-three")


@pytest.mark.parametrize("corrected", [True, False])
def test_aws_and_a_label_that_two_versions_want(
    aws: Aws, aws_front: Front, corrected: bool
) -> None:
    """With AWS the newest has it; with ministack both have."""
    name = own("wanted")
    aws.put(name, "sk-one")
    manager = connect("secretsmanager", aws_front.url if corrected else aws.url, aws.root)
    put = partial(manager.put_secret_value, SecretId=name, VersionStages=["AWSPENDING"])

    _, second = (put(SecretString=value)["VersionId"] for value in ("sk-two", "sk-three"))

    versions = aws.secret(name)["VersionIdsToStages"]
    pending = [version for version, labels in versions.items() if "AWSPENDING" in labels]
    assert second in pending
    assert len(pending) == (1 if corrected else 2)


@pytest.mark.parametrize("corrected", [True, False])
def test_aws_and_a_secret_without_a_current_version(
    aws: Aws, aws_front: Front, corrected: bool
) -> None:
    """AWS lets AWSCURRENT only move; ministack removes it, and then there is no value."""
    name = own("current")
    version = aws.put(name, "sk-one")
    manager = connect("secretsmanager", aws_front.url if corrected else aws.url, aws.root)
    asked = {"SecretId": name, "VersionStage": "AWSCURRENT", "RemoveFromVersionId": version}

    removed = said(manager.update_secret_version_stage, **asked)
    read = said(manager.get_secret_value, SecretId=name)

    assert removed == ((400, "InvalidParameterException") if corrected else (200, ""))
    assert read == ((200, "") if corrected else (400, "ResourceNotFoundException"))


def test_aws_says_which_of_many_secrets_it_does_not_give(aws: Aws, aws_front: Front) -> None:
    """What is missing, deleted or forbidden is named in the answer; the rest is there."""
    there, deleted, hidden = own("there"), own("deleted"), own("hidden")
    for name in (there, deleted, hidden):
        aws.put(name, "sk-one")
    aws.client("secretsmanager").delete_secret(SecretId=deleted)
    policy = allow("secretsmanager:BatchGetSecretValue")
    policy["Statement"] += statement(
        "Allow", "secretsmanager:GetSecretValue", [aws.arn(there), aws.arn(deleted)]
    )["Statement"]
    keys = aws.user(own("batch"), policy)
    manager = connect("secretsmanager", aws_front.url, keys)

    answer = manager.batch_get_secret_value(SecretIdList=[there, deleted, hidden])
    missing = aws.client("secretsmanager").batch_get_secret_value(SecretIdList=[own("missing")])
    too_many = {"SecretIdList": [there] * 21}

    assert [(one["Name"], one["SecretString"]) for one in answer["SecretValues"]] == [
        (there, "sk-one")
    ]
    assert {(one["SecretId"], one["ErrorCode"]) for one in answer["Errors"]} == {
        (deleted, "InvalidRequestException"),
        (hidden, "AccessDeniedException"),
    }
    assert [one["ErrorCode"] for one in missing["Errors"]] == ["ResourceNotFoundException"]
    assert said(manager.batch_get_secret_value, **too_many) == (400, "InvalidParameterException")
    assert said(aws.client("secretsmanager").batch_get_secret_value, **too_many) == (200, "")


def test_aws_deletes_a_secret_later(aws: Aws) -> None:
    """It says when, gives no value from now on, and may be brought back."""
    name = own("deleted")
    aws.put(name, "sk-one")
    manager = aws.client("secretsmanager")
    get = partial(manager.get_secret_value, SecretId=name)
    put = partial(manager.put_secret_value, SecretId=name, SecretString="sk-two")

    manager.delete_secret(SecretId=name, RecoveryWindowInDays=7)
    left = aws.secret(name)["DeletedDate"] - datetime.now(UTC)
    answers = [said(get), said(put)]
    manager.restore_secret(SecretId=name)

    assert timedelta(days=6, hours=23) < left <= timedelta(days=7)
    assert answers == [(400, "InvalidRequestException")] * 2
    assert "DeletedDate" not in aws.secret(name)
    assert aws.value(name) == "sk-one"


def test_aws_has_no_value_where_there_is_none(aws: Aws, moto: Moto) -> None:
    """A missing secret, version and label are one code; moto has another status."""
    name = own("none")
    answers = []
    for server in (aws, moto):
        manager = server.client("secretsmanager")
        manager.create_secret(Name=name, SecretString="sk-one")
        get = manager.get_secret_value
        answers += [
            said(get, SecretId=own("missing")),
            said(get, SecretId=name, VersionId=token()),
            said(get, SecretId=name, VersionStage="ANOTHER"),
            said(manager.describe_secret, SecretId=own("missing")),
        ]

    assert answers[:4] == [(400, "ResourceNotFoundException")] * 4
    assert answers[4:] == [(404, "ResourceNotFoundException")] * 4


def test_aws_rotates_by_the_dates_that_the_front_is_given(
    aws: Aws, aws_front: Front, moto: Moto
) -> None:
    """ministack makes a version of the old value and keeps no dates; moto makes an empty one."""
    name = own("rotates")
    rules = {"AutomaticallyAfterDays": 30}
    described = []
    for server in (aws, moto):
        manager = server.client("secretsmanager")
        manager.create_secret(Name=name, SecretString="sk-one")
        manager.rotate_secret(SecretId=name, RotationRules=rules)
        described.append(manager.describe_secret(SecretId=name))
    next_time = datetime(2030, 1, 1, tzinfo=UTC)
    aws_front.describe(name, NextRotationDate=next_time.timestamp())
    front = connect("secretsmanager", aws_front.url, aws.root)

    dates = {"NextRotationDate", "LastRotatedDate"}
    assert [dates & one.keys() for one in described] == [set(), dates]
    assert [one["RotationEnabled"] for one in described] == [True, True]
    assert [one["RotationRules"] for one in described] == [rules, rules]
    assert [len(one["VersionIdsToStages"]) for one in described] == [2, 2]
    assert aws.value(name) == "sk-one"
    assert front.describe_secret(SecretId=name)["NextRotationDate"] == next_time
    read = said(moto.client("secretsmanager").get_secret_value, SecretId=name)
    assert read == (404, "ResourceNotFoundException")


def test_moto_reads_the_old_value_unless_it_is_told_which(moto: Moto) -> None:
    """After AWSCURRENT has moved, the default is what it was before."""
    name, pending = own("moved"), token()
    manager = moto.client("secretsmanager")
    first = manager.create_secret(Name=name, SecretString="sk-one")["VersionId"]
    manager.put_secret_value(
        SecretId=name,
        SecretString="sk-two",
        ClientRequestToken=pending,
        VersionStages=["AWSPENDING"],
    )
    move = partial(
        manager.update_secret_version_stage,
        SecretId=name,
        VersionStage="AWSCURRENT",
        MoveToVersionId=pending,
    )

    answers = [
        said(move),
        said(move, RemoveFromVersionId=pending),
        said(move, RemoveFromVersionId=first),
    ]
    default = manager.get_secret_value(SecretId=name)["SecretString"]
    current = manager.get_secret_value(SecretId=name, VersionStage="AWSCURRENT")["SecretString"]

    assert answers == [(400, "InvalidParameterException")] * 2 + [(200, "")]
    assert (default, current) == ("sk-one", "sk-two")
    assert moto.client("sts").get_caller_identity()["Account"] == moto.account


@pytest.mark.parametrize(
    ("operation", "call", "asked"),
    [
        ("DescribeSecret", "describe_secret", {}),
        ("GetSecretValue", "get_secret_value", {}),
        ("PutSecretValue", "put_secret_value", {"SecretString": "sk-two"}),
        (
            "UpdateSecretVersionStage",
            "update_secret_version_stage",
            {"VersionStage": "ANOTHER", "MoveToVersionId": "0" * 32},
        ),
        ("BatchGetSecretValue", "batch_get_secret_value", None),
    ],
)
def test_aws_refuses_what_no_policy_allows(
    aws: Aws, aws_front: Front, operation: str, call: str, asked: dict[str, Any] | None
) -> None:
    """The text says who may not do what. AWS says so with 400; ministack with 403."""
    name, user = own("denied"), own("nobody")
    aws.put(name, "sk-one")
    keys = aws.user(user)
    asked = {"SecretIdList": [name]} if asked is None else {"SecretId": name, **asked}

    with pytest.raises(ClientError) as refused:
        getattr(aws.client("secretsmanager", keys), call)(**asked)
    corrected = said(getattr(connect("secretsmanager", aws_front.url, keys), call), **asked)

    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert corrected == (400, "AccessDeniedException")
    assert refused.value.response["Error"] == {
        "Code": "AccessDeniedException",
        "Message": f"User: arn:aws:iam::{aws.account}:user/{user} is not authorized to perform: "
        f"secretsmanager:{operation} because no identity-based policy allows the "
        f"secretsmanager:{operation} action",
    }


def test_aws_takes_policies_of_users_and_of_secrets(aws: Aws) -> None:
    """One that allows is enough, if none forbids."""
    name = own("policies")
    aws.put(name, "sk-one")
    arn, user = aws.arn(name), own("reader")
    who = {"AWS": f"arn:aws:iam::{aws.account}:user/{user}"}
    read = "secretsmanager:GetSecretValue"

    def answer(own_policy: dict[str, Any] | None, of_secret: dict[str, Any] | None) -> int:
        manager = aws.client("secretsmanager")
        if of_secret:
            manager.put_resource_policy(SecretId=name, ResourcePolicy=json.dumps(of_secret))
        keys = aws.user(user, own_policy)
        status, _ = said(aws.client("secretsmanager", keys).get_secret_value, SecretId=name)
        manager.delete_resource_policy(SecretId=name)
        return status

    answers = [
        answer(None, None),
        answer(None, statement("Allow", read, "*", Principal=who)),
        answer(allow(read, f"{arn[:-6]}??????"), None),
        answer(allow(read, arn), statement("Deny", read, "*", Principal="*")),
        answer(allow(read, f"{arn}-another"), None),
        answer(statement("Deny", read, arn), statement("Allow", read, "*", Principal=who)),
    ]

    assert answers == [403, 200, 200, 403, 403, 403]


def test_aws_knows_who_signed(aws: Aws) -> None:
    """A wrong secret key and an unknown access key are told apart; the root's is not checked."""
    name, user = own("signed"), own("signer")
    aws.put(name, "sk-one")
    keys = aws.user(user, allow("secretsmanager:*"))
    session = aws.session(aws.role(own("role"), allow("secretsmanager:*")))
    signers = [
        keys,
        session,
        replace(keys, secret_key="another"),
        replace(keys, access_key="AKIAIOSFODNN7EXAMPLE"),
        replace(session, session_token="another"),
        replace(session, session_token=None),
        replace(aws.root, secret_key="another"),
    ]

    secrets_ = [
        said(aws.client("secretsmanager", one).describe_secret, SecretId=name) for one in signers
    ]
    identity = [said(aws.client("sts", one).get_caller_identity) for one in signers]

    assert secrets_ == [
        (200, ""),
        (200, ""),
        (400, "InvalidSignatureException"),
        *[(400, "UnrecognizedClientException")] * 3,
        (200, ""),
    ]
    assert identity == [
        (200, ""),
        (200, ""),
        (403, "SignatureDoesNotMatch"),
        *[(403, "InvalidClientTokenId")] * 3,
        (200, ""),
    ]
    found = aws.client("sts", keys).get_caller_identity()
    assert (found["Account"], found["Arn"].rpartition("/")[2]) == (aws.account, user)


def test_aws_ends_a_session_and_minds_the_clock() -> None:
    """A role is taken for 15 minutes at least; whose clock is wrong has signed nothing."""
    with Aws(own_clock=True) as aws:
        aws.put("llm", "sk-one")
        role = aws.role("role", allow("secretsmanager:*"))
        session = aws.session(role, 900)
        user = aws.user("user", allow("secretsmanager:*"))
        left = session.expiration - datetime.now(UTC) if session.expiration else None

        def answers(minutes: int) -> list[tuple[int, str]]:
            """What both are told, while the server's clock is ahead and ours is not, or is too."""
            aws.set_clock(timedelta(minutes=minutes))
            calls = [
                partial(aws.client(service, keys).__getattribute__(name), **asked)
                for keys in (user, session)
                for service, name, asked in (
                    ("secretsmanager", "get_secret_value", {"SecretId": "llm"}),
                    ("sts", "get_caller_identity", {}),
                )
            ]
            return [said(call) for call in calls]

        on_time = answers(0)
        fast, slow = answers(20), answers(-20)
        moved = auth.get_current_datetime
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                auth, "get_current_datetime", lambda *a: moved(*a) + timedelta(minutes=20)
            )
            late = answers(20)

    skewed = [(400, "InvalidSignatureException"), (403, "SignatureDoesNotMatch")]
    assert left is not None
    assert timedelta(seconds=890) < left <= timedelta(seconds=900)
    assert on_time == [(200, "")] * 4
    assert fast == slow == skewed * 2
    assert late == [(200, "")] * 2 + [(400, "ExpiredTokenException"), (403, "ExpiredToken")]


def test_aws_lets_roles_be_taken_by_whom_they_trust(aws: Aws) -> None:
    """Neither a role that is not there nor a user without the right for it."""
    role = aws.role(own("role"))
    may, may_not = aws.user(own("may"), allow("sts:AssumeRole")), aws.user(own("may-not"))
    asked = {"RoleArn": role, "RoleSessionName": "session", "DurationSeconds": 900}

    answers = [
        said(aws.client("sts", may).assume_role, **asked),
        said(aws.client("sts", may).assume_role, **asked | {"RoleArn": f"{role}-another"}),
        said(aws.client("sts", may_not).assume_role, **asked),
    ]

    assert answers == [(200, ""), (403, "AccessDenied"), (403, "AccessDenied")]


def test_aws_takes_a_provider_s_token_and_does_not_read_it_closely(aws: Aws, oidc: Oidc) -> None:
    """The provider and the audience count; AWS checks the signature and the time too."""
    name = own("web")
    aws.put(name, "sk-one")
    role = aws.web_role(own("web"), oidc.issuer, oidc.audience, allow("secretsmanager:*"))
    take = partial(
        aws.client("sts", signature_version=UNSIGNED).assume_role_with_web_identity,
        RoleSessionName="session",
        DurationSeconds=900,
    )
    forger, stranger = Signer(oidc.issuer), Signer("https://another.example")

    answers = [
        said(take, RoleArn=role, WebIdentityToken=given)
        for given in (
            oidc.token(),
            oidc.token("https://another.example"),
            stranger.token("me", oidc.audience),
            "no-token-at-all",
            forger.token("me", oidc.audience),
            forger.token("me", oidc.audience, seconds=-300),
        )
    ]
    made = take(RoleArn=role, WebIdentityToken=oidc.token())["Credentials"]
    keys = Keys(made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"])

    assert answers == [(200, ""), *[(403, "AccessDenied")] * 3, (200, ""), (200, "")]
    assert said(aws.client("secretsmanager", keys).get_secret_value, SecretId=name) == (200, "")


def test_aws_that_hangs_or_is_gone_comes_back() -> None:
    """A hang is no refusal. What it knew is lost with its process."""
    with Aws() as aws:
        aws.put("llm", "sk-one")
        manager = aws.client("secretsmanager", read_timeout=0.2)
        aws.pause()
        with pytest.raises(ReadTimeoutError):
            manager.describe_secret(SecretId="llm")
        aws.resume()
        resumed = aws.value("llm")
        aws.kill()
        with pytest.raises(EndpointConnectionError):
            manager.describe_secret(SecretId="llm")
        aws.start()
        started = said(manager.describe_secret, SecretId="llm")

    assert (resumed, started) == ("sk-one", (400, "ResourceNotFoundException"))
    assert not listens(aws.url)


FAULTS: list[tuple[Fault, object, bool]] = [
    (Delay(0.05), "sk-one", True),
    (Dated(timedelta(hours=-3)), "sk-one", True),
    (Hang(), ReadTimeoutError, False),
    (Reset(), ConnectionClosedError, False),
    (Reset(commit=True), ConnectionClosedError, True),
    (CommitThenDrop(), ConnectionClosedError, True),
    (Html(), None, False),
    (Truncated(), None, True),
    (GarbageJson(), None, False),
    (Status(429), (429, "429"), False),
    (Html(503), (503, "503"), False),
    (Redirect("http://127.0.0.1:9/"), (302, "302"), False),
    (refusal("ThrottlingException"), (400, "ThrottlingException"), False),
    (refusal("InternalServiceError", status=500), (500, "InternalServiceError"), False),
    (refusal("DecryptionFailure"), (400, "DecryptionFailure"), False),
    (refusal("ExpiredTokenException"), (400, "ExpiredTokenException"), False),
]


@pytest.mark.parametrize(("fault", "outcome", "forwarded"), FAULTS)
def test_aws_s_answers_break_as_they_are_told_to(
    aws: Aws, aws_front: Front, fault: Fault, outcome: object, forwarded: bool
) -> None:
    """A page, half a body and no JSON are a success without a value to botocore."""
    name = own("faults")
    aws.put(name, "sk-one")
    keys = aws.user(own("reader"), allow("secretsmanager:*"))
    manager = connect("secretsmanager", aws_front.url, keys, read_timeout=0.5)
    armed = aws_front.fault(fault, "GetSecretValue", nth=2)
    get = partial(manager.get_secret_value, SecretId=name, VersionStage="AWSCURRENT")
    found: object

    first = get()["SecretString"]
    manager.describe_secret(SecretId=name)
    try:
        found = get().get("SecretString")
    except ClientError as refused:
        answer = refused.response
        found = (answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"])
    except BotoCoreError as error:
        found = type(error)
    third = get()["SecretString"]

    assert (first, found, third) == ("sk-one", outcome, "sk-one")
    assert armed.wait().forwarded == forwarded
    assert aws_front.calls == (
        ("GetSecretValue", name),
        ("DescribeSecret", name),
        ("GetSecretValue", name),
        ("GetSecretValue", name),
    )
    assert aws_front.count("GetSecretValue", name) == 3


def test_aws_s_writes_are_done_though_the_answer_is_lost(aws: Aws, aws_front: Front) -> None:
    """The same write again is no other one. STS is broken in its own words."""
    name, known = own("lost"), token()
    aws.put(name, "sk-one")
    manager = connect("secretsmanager", aws_front.url, aws.root)
    asked = {
        "SecretId": name,
        "SecretString": "sk-two",
        "ClientRequestToken": known,
        "VersionStages": ["AWSPENDING"],
    }
    aws_front.fault(CommitThenDrop(), "PutSecretValue", secret=name)
    aws_front.fault(refusal("ExpiredToken", status=403, sts=True), "GetCallerIdentity")

    with pytest.raises(ConnectionClosedError):
        manager.put_secret_value(**asked)
    lost = aws.labels(name)["AWSPENDING"]
    again = manager.put_secret_value(**asked)["VersionId"]
    sts = connect("sts", aws_front.url, aws.root)
    who = said(sts.get_caller_identity), said(sts.get_caller_identity)
    aws_front.forget()

    assert lost == again == known
    assert who == ((403, "ExpiredToken"), (200, ""))
    assert (aws_front.calls, aws_front.errors) == ((), [])


READ = """
import sys
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

config = Config(retries={"total_max_attempts": 1})
try:
    manager = Session().create_client("secretsmanager", config=config)
    print(manager.get_secret_value(SecretId=sys.argv[1])["SecretString"])
except ClientError as refused:
    print(refused.response["Error"]["Code"])
except BotoCoreError as error:
    print(type(error).__name__)
"""


def read_by_boto(name: str, environment: Mapping[str, str]) -> str:
    """Read a secret in a process of its own; what is printed is the value, or what went wrong."""
    done = subprocess.run(
        [sys.executable, "-c", READ, name],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_sso_keeps_a_signed_in_user_going(aws: Aws, sso: Sso, home: Home) -> None:
    """A token that has ended is refreshed, and the file of the sign-in is written again."""
    name = own("sso")
    aws.put(name, "sk-one")
    environment = {**home.environment, **aws.environment(), **sso.environment(home.path)}

    sso.write(home.path)
    valid = read_by_boto(name, environment), sso.refreshes, sso.handed_out
    file = sso.write(home.path, timedelta(hours=-1))
    refreshed = read_by_boto(name, environment), sso.refreshes, sso.handed_out
    ends = datetime.fromisoformat(json.loads(file.read_text())["expiresAt"])

    assert valid == ("sk-one", 0, 1)
    assert refreshed == ("sk-one", 1, 2)
    assert ends > datetime.now(UTC)


def test_sso_that_does_not_know_the_user_any_more(aws: Aws, sso: Sso, home: Home) -> None:
    """Nobody to refresh, a refusal, an outage and no sign-in are told apart by botocore."""
    environment = {**home.environment, **aws.environment(), **sso.environment(home.path)}
    told = []

    sso.write(home.path, timedelta(hours=-1), refresh=False)
    told.append(read_by_boto("llm", environment))
    sso.refresh_has_expired = True
    sso.write(home.path, timedelta(hours=-1))
    told.append(read_by_boto("llm", environment))
    sso.refuses = True
    file = sso.write(home.path)
    told.append(read_by_boto("llm", environment))
    sso.is_down = True
    told.append(read_by_boto("llm", environment))
    file.unlink()
    told.append(read_by_boto("llm", environment))

    assert told == [
        "TokenRetrievalError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "ConnectionClosedError",
        "SSOTokenLoadError",
    ]
    assert (sso.refreshes, sso.handed_out) == (1, 0)


def test_aws_credentials_of_a_machine(aws: Aws, aws_metadata: Metadata, home: Home) -> None:
    """A container's and an instance's are taken; those of ministack's own are not."""
    name = own("machine")
    aws.put(name, "sk-one")
    environment = {**home.environment, **aws.environment()}
    container, instance = (
        {**environment, **more} for more in (aws_metadata.container(), aws_metadata.instance())
    )
    theirs = {**instance, "AWS_EC2_METADATA_SERVICE_ENDPOINT": aws.url}

    read = [read_by_boto(name, one) for one in (container, instance, theirs)]
    aws_metadata.status = 404
    failed = read_by_boto(name, instance)  # a container's are asked for three seconds

    assert read == ["sk-one", "sk-one", "UnrecognizedClientException"]
    assert failed == "NoCredentialsError"
    assert aws_metadata.handed_out == 2
