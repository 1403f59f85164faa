"""The steps for GitHub Actions, run as a runner does, against a real LiteLLM.

The stand-in of the runner has what the steps use of one: a shell for each step with `bash -e`, a
file for outputs, a folder for the job, expressions, `if: always()`, masks, and nothing else of a
user's. It is no runner: nothing here ran at GitHub.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from keybroker.connect import github_actions
from keybroker.connect.plan import Place
from keybroker.errors import ConfigError
from tests.canaries import Canaries
from tests.resident import Home, Resident
from tests.servers.claude import NEWEST, run_claude
from tests.servers.exchange import Actions, Exchange
from tests.servers.install import installed, litellm_folder
from tests.servers.litellm import LiteLLM
from tests.servers.upstream import MODEL
from tests.test_config import read

pytestmark = pytest.mark.servers
ACTION = "anthropics/claude-code-action@v1"


@dataclass
class Runner:
    """A machine that runs one job; `log` is what anybody may read of it."""

    home: Home
    secrets: Mapping[str, str]
    log: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    actions: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    given: Mapping[str, str] = field(default_factory=dict)  # what each step has of the runner's
    raw: str = ""  # all that steps printed, before anything was masked

    def run(self, job: Mapping[str, Any], *, fails: str | None = None) -> None:
        """Run the steps of a job; `fails` is the name of the one that does."""
        self.temp = self.home.path / "_temp"
        self.temp.mkdir(exist_ok=True)
        for step in job["steps"]:
            if self.failed and step.get("if") != "always()":
                continue
            env = {k: self.value(v) for k, v in {**job["env"], **step.get("env", {})}.items()}
            if "uses" in step:
                given = {k: self.value(v) for k, v in step["with"].items()}
                self.actions.append({"uses": step["uses"], "with": given, "env": env})
            else:
                self.shell(step, env)
            self.failed = self.failed or step["name"] == fails

    def shell(self, step: Mapping[str, Any], env: Mapping[str, str]) -> None:
        output = self.temp / "output"
        output.write_text("")
        script = self.temp / "step.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "-e", str(script)],
            cwd=self.home.path,
            env={
                "PATH": f"{self.home.path / 'bin'}:{Path(sys.executable).parent}:{os.defpath}",
                "HOME": str(self.home.path),
                "RUNNER_TEMP": str(self.temp),
                "GITHUB_OUTPUT": str(output),
                **self.given,
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        for line in done.stdout.splitlines():
            self.raw += f"{line}\n"
            if command := re.fullmatch(r"::add-mask::(.+)", line):
                self.masks.append(command[1].replace("%25", "%"))
                continue
            for mask in self.masks:
                line = line.replace(mask, "***")
            self.log.append(line)
        found = dict(line.split("=", 1) for line in output.read_text().splitlines())
        self.outputs[step.get("id", "")] = found
        self.failed = self.failed or done.returncode != 0

    def value(self, text: object) -> str:
        """Put in what an expression stands for."""
        known = {f"secrets.{name}": value for name, value in self.secrets.items()}
        known |= {"runner.temp": str(self.temp), "vars.KEYBROKER": "./keybroker.whl"}
        for step, outputs in self.outputs.items():
            known |= {f"steps.{step}.outputs.{name}": value for name, value in outputs.items()}
        return re.sub(r"\$\{\{ (\S+) \}\}", lambda found: known.get(found[1], ""), str(text))


@pytest.fixture
def runner(home: Home, litellm: LiteLLM) -> Iterator[Runner]:
    """A fresh machine; what would install keybroker writes down what it was asked for."""
    made = Runner(home, {"KEYBROKER_ADMIN_KEY": litellm.master_key})
    pipx = home.path / "bin" / "pipx"
    pipx.parent.mkdir()
    pipx.write_text('#!/bin/sh\necho "pipx $*"\n')
    pipx.chmod(0o755)
    yield made


@pytest.fixture
def job(litellm: LiteLLM) -> dict[str, Any]:
    """The job, as it is printed on another machine."""
    config = read(
        '[defaults]\nheaders = { "X-Route" = "eng", "X-B" = "2" }\n'
        f'[profiles.work]\nbase_url = "{litellm.url}"\nhelper_ttl = "30m"\n'
        '[profiles.work.source]\ntype = "litellm"\nadmin = { keyring = "admin" }\n'
        f'models = ["{MODEL}"]\nmax_budget = 3\n'
    )
    return from_yaml(github_actions.plan(config.profile("work"), Place.here(), "user").text)


def from_yaml(text: str) -> dict[str, Any]:
    """Read YAML with the library that LiteLLM has in its environment."""
    python = installed(litellm_folder()) / "venv/bin/python"
    script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))"
    done = subprocess.run(
        [str(python), "-c", script], input=text, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alive(litellm: LiteLLM, key: str) -> bool:
    return sha256(key.encode()).hexdigest() in {row["token"] for row in litellm.key_rows()}


def ours(litellm: LiteLLM, runner: Runner) -> list[dict[str, Any]]:
    [file] = (runner.home.path / "_temp/keybroker").glob("*/instance")
    rows = litellm.key_rows()
    return [r for r in rows if str(r["key_alias"]).startswith(f"kb-{file.read_text()}-")]


def test_a_job_has_a_key_of_its_own_that_ends_with_it(
    runner: Runner, job: dict[str, Any], litellm: LiteLLM
) -> None:
    """
    It is minted for an hour, given to the action as key and as bearer token, and revoked.

    The client that the action starts has an answer with both; no process of ours is left.
    """
    runner.run({**job, "steps": job["steps"][:-1]})

    assert not runner.failed, runner.log
    [action] = runner.actions
    key = action["with"]["anthropic_api_key"]
    [row] = ours(litellm, runner)
    assert alive(litellm, key)
    assert (row["expires"] - row["created_at"]).total_seconds() == pytest.approx(3600, abs=5)
    assert (row["max_budget"], row["models"]) == (3.0, [MODEL])
    assert action["uses"] == ACTION
    assert action["env"] == {
        "ANTHROPIC_BASE_URL": litellm.url,
        "ANTHROPIC_CUSTOM_HEADERS": "X-Route: eng\nX-B: 2",
        "ANTHROPIC_AUTH_TOKEN": key,
    }
    (runner.home.path / "user").mkdir()
    variables = {**action["env"], "ANTHROPIC_API_KEY": key, "ANTHROPIC_MODEL": MODEL}
    done = run_claude(NEWEST, runner.home.path / "user", None, env_extra=variables)
    assert (done.rc, done.stdout) == (0, "pong\n"), done

    runner.run({**job, "steps": job["steps"][-1:]})
    assert not runner.failed, runner.log
    assert not alive(litellm, key)
    assert ours(litellm, runner) == []
    assert runner.log[-1] == "work: 1 revoked"


@pytest.mark.parametrize("step", ["Claude Code", "Mint a key for this job"])
def test_it_ends_also_when_a_step_fails(
    runner: Runner, job: dict[str, Any], litellm: LiteLLM, step: str
) -> None:
    """The last step runs always, and needs nothing of those that failed."""
    runner.run(job, fails=step)

    assert runner.failed
    assert len(runner.actions) == (1 if step == "Claude Code" else 0)
    assert not alive(litellm, runner.outputs["keybroker"]["key"])
    assert ours(litellm, runner) == []


def test_a_job_needs_no_secret_where_it_signs_in_by_itself(
    runner: Runner, litellm: LiteLLM
) -> None:
    """GitHub says which job it is; what a provider gives for that mints the key, and ends it."""
    with Actions() as actions, Exchange(actions.signer) as provider:
        provider.give = lambda: litellm.master_key
        config = read(
            f'[profiles.work]\nbase_url = "{litellm.url}"\n'
            '[profiles.work.source]\ntype = "litellm"\nlogin = "ci"\n'
            '[logins.ci]\ntype = "workload"\njwt = "github-actions"\ngrant = "jwt_bearer"\n'
            f'jwt_audience = "{provider.url}"\ntoken_url = "{provider.token_url}"\n'
        )
        text = github_actions.plan(config.profile("work"), Place.here(), "user").text
        job = from_yaml(text)
        assert "secrets." not in text
        assert job["permissions"] == {"contents": "read", "id-token": "write"}
        runner.secrets, runner.given = {}, actions.variables
        runner.run({**job, "steps": job["steps"][:-1]})
        assert not runner.failed, runner.log
        key = runner.outputs["keybroker"]["key"]
        assert alive(litellm, key)
        runner.run({**job, "steps": job["steps"][-1:]})
        assert not runner.failed, runner.log
        assert not alive(litellm, key)
        assert provider.asked[0]["grant_type"].endswith(":jwt-bearer")
    files = [one.read_bytes() for one in runner.home.path.rglob("*") if one.is_file()]
    known = [litellm.master_key.encode(), actions.secret.encode()]
    assert [one for one in known if any(one in data for data in files)] == []


def test_a_person_s_login_is_none_of_a_job_s() -> None:
    """There a key with few rights makes the job's key, as without a login."""
    config = read(
        '[profiles.work]\nbase_url = "https://llm.example.com"\n'
        '[profiles.work.source]\ntype = "litellm"\nlogin = "corp"\n'
        '[logins.corp]\ntype = "oidc"\nissuer = "https://login.example.com"\n'
    )
    text = github_actions.plan(config.profile("work"), Place.here(), "user").text
    assert "corp" not in text
    assert 'admin = { env = "KEYBROKER_ADMIN_KEY" }' in text


def test_nobody_reads_a_key_in_the_log(runner: Runner, job: dict[str, Any]) -> None:
    """The first line that has the key is the one that masks it; the admin key is in none."""
    runner.run(job)
    key = runner.outputs["keybroker"]["key"]

    assert [line for line in runner.raw.splitlines() if key in line] == [f"::add-mask::{key}"]
    assert key not in "\n".join(runner.log)
    assert runner.secrets["KEYBROKER_ADMIN_KEY"] not in runner.raw
    assert runner.log[0] == "pipx install ./keybroker.whl"


def test_the_admin_key_is_in_no_file(runner: Runner, job: dict[str, Any]) -> None:
    """What a step of somebody else's finds on the disk mints no keys."""
    canaries = Canaries()
    canaries.know("admin", runner.secrets["KEYBROKER_ADMIN_KEY"])
    runner.run({**job, "steps": job["steps"][:-1]})

    assert not runner.failed
    assert canaries.below(runner.home.path) == []
    assert not (runner.home.path / ".config/keybroker").exists()
    assert [*(runner.home.path / ".local/state").iterdir()] == []


def test_no_daemon_runs_on_a_runner(runner: Runner, job: dict[str, Any]) -> None:
    """Nor does one of the runner's own user come between."""
    mine = Resident(runner.home)
    mine.configure(
        '[profiles.other]\nbase_url = "http://127.0.0.1:9"\nverify = "none"\n'
        '[profiles.other.source]\ntype = "static"\nplaceholder = "x"\n'
    )
    mine.start()
    try:
        runner.run(job)
        assert not runner.failed, runner.log
        assert mine.row("other")["profile"] == "other"
    finally:
        mine.stop()


def test_without_the_secret_nothing_is_made(runner: Runner, job: dict[str, Any]) -> None:
    """As for a pull request from a fork: it says which variable is empty, and ends."""
    runner.secrets = {}
    runner.run(job)

    assert runner.failed
    assert runner.actions == []
    assert "KEYBROKER_ADMIN_KEY" in "\n".join(runner.log)


def test_a_key_with_a_percent_sign_is_masked_as_it_is(runner: Runner, job: dict[str, Any]) -> None:
    """In a command of the runner's `%25` stands for it."""
    fake = runner.home.path / "bin" / "keybroker"
    fake.write_text("#!/bin/sh\necho 'sk-a%25b%c'\n")
    fake.chmod(0o755)
    runner.run(job)

    assert runner.masks == ["sk-a%25b%c"]
    assert runner.outputs["keybroker"] == {"key": "sk-a%25b%c"}


def test_a_source_that_mints_nothing_is_refused() -> None:
    """There is no key that could end with the job."""
    config = read(
        '[profiles.work]\nbase_url = "https://llm.example.com"\n'
        '[profiles.work.source]\ntype = "static"\nkey = { env = "K" }\n'
    )
    with pytest.raises(ConfigError, match="a source of type static makes no key for one job"):
        github_actions.plan(config.profile("work"), Place.here(), "user")
