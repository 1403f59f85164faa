"""The test servers are what the other tests take them for."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Home
from tests.servers.agent import Agent
from tests.servers.authority import Authority
from tests.servers.awslogin import (
    ACCESS_KEY,
    SECRET_KEY,
    SERVER_ID_HEADER,
    AwsLogin,
    signature,
)
from tests.servers.claude import run_claude, start_stream
from tests.servers.cluster import Cluster
from tests.servers.database import Database
from tests.servers.keyring import Keyring
from tests.servers.kubernetes import Kubernetes
from tests.servers.ldap import Ldap
from tests.servers.litellm import UPSTREAM_KEY, LiteLLM
from tests.servers.oidc import Oidc
from tests.servers.processes import wait_until
from tests.servers.signer import Signer
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
