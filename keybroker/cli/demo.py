"""demo: the whole life of keys in twenty seconds, on a gateway of its own."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from keybroker.cli.base import coloured
from keybroker.connect.line import helper_command
from keybroker.errors import KeybrokerError

SECONDS = 16.0
REFRESH_SECONDS = 1.0  # as often as the profile's helper_ttl says
PAUSE_SECONDS = 0.2
COLOURS = {"minted": "cyan", "verified": "green", "given": "green", "revoked": "red"}
CONFIGURATION = """\
[cache]
key = "file"                       # the demo keeps nothing in your keyring

[profiles.demo]
base_url = "{url}"
helper_ttl = "1s"
hold = "2s"                        # a replaced key is revoked this much later
[profiles.demo.source]
type = "litellm"
admin = {{ file = "{admin}" }}
lifetime = "9s"                    # real keys live for hours
"""


@click.command("demo")
@click.option("--keep", is_flag=True, help="Leave the gateway running for a claude of yours.")
def demo_command(keep: bool) -> None:
    """Watch keys being minted, verified, handed out, rotated and revoked.

    A small gateway is started on loopback, and a client talks to it as Claude Code does, while
    the daemon replaces its key again and again. Nothing leaves this machine and nothing is left
    behind.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _stage() as stage:
        print(f"A LiteLLM-shaped gateway at {stage.url}, keys that live for 9 s, and a daemon.\n")
        stage.play(SECONDS)
        if keep:
            _keep(stage)
        stage.end()
    print("\nNothing is left behind. Your own gateway: keybroker init")


@dataclass(slots=True)
class _Stage:
    """The gateway, the client and the folder of one demonstration."""

    gateway: Any
    folder: Path
    environment: Mapping[str, str]
    started: float = field(default_factory=time.monotonic)
    told: int = 0
    given: str = ""
    rotations: int = 0

    @property
    def url(self) -> str:
        return str(self.gateway.url)

    def run(self, *arguments: str) -> str:
        """Run a command of ours as a user does; return what it printed."""
        return self._output(*COMMAND, *arguments)

    def helper(self) -> str:
        """Ask for the key as Claude Code does; the first time, this starts the daemon."""
        return self._output(*helper_command("-", "demo")).strip()

    def _output(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        self.tell()
        if done.returncode != 0:
            raise KeybrokerError(f"demo: a command failed: {done.stderr.strip()[:200]}")
        return done.stdout

    def play(self, seconds: float) -> None:
        """Talk to the gateway with the helper's key, which is asked for anew each second."""
        import httpx

        until = time.monotonic() + seconds
        key, asked_at, answered, refused = "", 0.0, 0, 0
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while time.monotonic() < until:
                if time.monotonic() - asked_at >= REFRESH_SECONDS:
                    asked_at = time.monotonic()
                    key = self.helper()
                status = client.post(
                    "/v1/messages",
                    headers={"x-api-key": key, "anthropic-version": "2023-06-01"},
                    json={
                        "model": "claude-sonnet-4-5",
                        "max_tokens": 16,
                        "messages": [{"role": "user", "content": "hi"}],
                    },
                ).status_code
                answered, refused = answered + (status == 200), refused + (status != 200)
                time.sleep(PAUSE_SECONDS)
        line = f"{answered} requests answered, {refused} refused, across {self.rotations} rotations"
        print(f"\n{coloured(line, 'red' if refused else 'green')}")
        if refused:
            raise KeybrokerError(f"demo: {refused} requests were refused")

    def end(self) -> None:
        """Revoke what is left, and see that the gateway has no live key any more."""
        self.run("revoke", "demo")
        left = len(self.gateway.live_keys())
        print(f"{left} keys alive at the gateway")
        if left:
            raise KeybrokerError(f"demo: {left} keys were left alive at the gateway")

    def tell(self) -> None:
        """Print what the audit log has since the last time."""
        lines = [
            line
            for log in self.folder.rglob("audit.jsonl")
            for line in log.read_text("ascii").splitlines()[1:]
        ]
        for text in lines[self.told :]:
            self.say(json.loads(text))
        self.told = len(lines)

    def say(self, line: Mapping[str, str]) -> None:
        event, fingerprint = line["event"], line.get("fingerprint", "")
        if event == "given":
            if fingerprint == self.given:
                return  # the same key again
            self.rotations += self.given != ""
            self.given = fingerprint
        words = {
            "minted": f"{fingerprint}  under the label {line.get('label', '')}",
            "verified": f"{fingerprint}  {line.get('look', '')}: GET /v1/models took it",
            "given": f"{fingerprint}  to the client",
            "revoked": f"{fingerprint}  deleted at the gateway",
            "failed": line.get("message", ""),
        }
        names = {"given": "handed out"}
        if event in words:
            moment = time.monotonic() - self.started
            name = coloured(f"{names.get(event, event):<10}", COLOURS.get(event, "yellow"))
            print(f"{moment:5.1f} s  {name}  {words[event]}", flush=True)


COMMAND = (sys.executable, "-I", "-c", "from keybroker.cli import main; main()")


@contextmanager
def _stage() -> Iterator[_Stage]:
    from keybroker.devgateway import DevGateway

    with tempfile.TemporaryDirectory(prefix="keybroker-demo-") as name, DevGateway() as gateway:
        folder = Path(name)
        admin, file = folder / "admin-key", folder / "config.toml"
        for path, text in (
            (admin, gateway.master_key),
            (file, CONFIGURATION.format(url=gateway.url, admin=admin)),
        ):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
                opened.write(text)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "KEYBROKER_CONFIG": str(file),
        }
        stage = _Stage(gateway, folder, environment)
        try:
            yield stage
        finally:
            stage.run("daemon", "--stop")


def _keep(stage: _Stage) -> None:
    """Wait for Ctrl-C while somebody's own client talks to the gateway."""
    variables = " ".join(
        f"{k}={shlex.quote(v)}" for k, v in stage.environment.items() if k != "PATH"
    )
    helper = shlex.join(helper_command("-", "demo"))
    settings = {
        "apiKeyHelper": f"exec env {variables} {helper}",
        "env": {
            "ANTHROPIC_BASE_URL": stage.url,
            "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "1000",
        },
    }
    path = stage.folder / "settings.json"
    path.write_text(json.dumps(settings, indent=2))
    print("\nThe gateway stays up. In another terminal:\n")
    print(f"  claude --settings {shlex.quote(str(path))} -p hi\n")
    print("Ctrl-C ends it and revokes its keys.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()
