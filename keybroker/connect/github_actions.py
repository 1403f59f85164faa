"""A workflow of GitHub's: the steps that have a key made for one job, and ended with it.

Nothing stays on a runner: no daemon, no keyring. The steps share one folder, `runner.temp`, which
is the job's own: configuration, journal, and the key, sealed beside the key that opens it. The
admin key is in the environment of two steps and in no file.

See: https://code.claude.com/docs/en/github-actions and
https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

import json
from typing import Any

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect.plan import Place, Plan
from keybroker.errors import ConfigError
from keybroker.fields import GITHUB
from keybroker.rotation import Kind
from keybroker.signin import SignIn
from keybroker.tables import table_lines

SCOPES = ("user",)
STANDS_ALONE = True
ADMIN = "KEYBROKER_ADMIN_KEY"
MINUTES = 60
# Of a profile, what is meant for one machine or has no use in a job.
LEFT_OUT = (
    *("publish", "vault", "aws", "claude", "ca", "hold", "helper_ttl"),
    *("push", "openai_base_url", "export"),
)
HERE = (  # this machine's
    "NODE_EXTRA_CA_CERTS",
    guidance.TTL_VARIABLE,
)
STEPS = """\
# Steps of one job. {needs}
# Variable: KEYBROKER, what pip installs keybroker from: a wheel's or a repository's address.
timeout-minutes: {minutes}  # a key lives as long as the job may take
{permissions}env:
{environment}
steps:
  - name: Install keybroker
    run: pipx install "$KEYBROKER"
    env:
      KEYBROKER: ${{{{ vars.KEYBROKER }}}}

  - name: Mint a key for this job
    id: keybroker
    run: |
      umask 077
      cat > "$KEYBROKER_CONFIG" <<'END'
{configuration}
      END
      key="$(keybroker get --no-start {profile})"
      echo "::add-mask::${{key//%/%25}}"
      echo "key=$key" >> "$GITHUB_OUTPUT"
    env:
      KEYBROKER_CONFIG: ${{{{ runner.temp }}}}/keybroker.toml
      XDG_STATE_HOME: ${{{{ runner.temp }}}}
      XDG_RUNTIME_DIR: ${{{{ runner.temp }}}}
{secret}
  - name: Claude Code
    uses: anthropics/claude-code-action@v1
    with:
      anthropic_api_key: ${{{{ steps.keybroker.outputs.key }}}}
      prompt: ping
    env:
      # for gateways that read a bearer token
      ANTHROPIC_AUTH_TOKEN: ${{{{ steps.keybroker.outputs.key }}}}

  - name: Revoke the key
    if: always()
    run: keybroker revoke {profile}
    env:
      KEYBROKER_CONFIG: ${{{{ runner.temp }}}}/keybroker.toml
      XDG_STATE_HOME: ${{{{ runner.temp }}}}
      XDG_RUNTIME_DIR: ${{{{ runner.temp }}}}
{secret}"""


SECRET = f"      {ADMIN}: ${{{{ secrets.{ADMIN} }}}}\n"
NEEDS = f"Secret: {ADMIN}, a key with key-management rights and few of them."
NEEDS_NONE = "Without a secret: GitHub says which job it is, and the provider trusts it."
# As GitHub gives a checkout by itself, and what a job may ask who it is with.
PERMISSIONS = "permissions:\n  contents: read\n  id-token: write\n"


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Print the steps.

    Raises:
        ConfigError: The source mints no keys.
    """
    if profile.kind is not Kind.MINTED:
        raise ConfigError(
            f"github-actions: {profile.name}: a source of type {profile.type} makes no key for "
            "one job",
            hint="put a key into a secret, and pass it as anthropic_api_key",
        )
    machine = _machine(profile)
    variables = {k: v for k, v in guidance.environment(profile).items() if k not in HERE}
    before = [
        "a pull request from a fork has no secrets, and so no key",
        "what runs in the job could change what its last step does: use the smallest admin key",
    ]
    if machine is not None:
        before = ["the provider has to trust this repository's jobs, and no pull request's"]
    if profile.ca is not None:
        before.append("the gateway's authority (ca) has to come with the checkout; it is left out")
    text = STEPS.format(
        minutes=MINUTES,
        environment=_indented(_yaml(variables), 2),
        configuration=_indented(_configuration(profile, machine), 6),
        profile=profile.name,
        needs=NEEDS if machine is None else NEEDS_NONE,
        permissions="" if machine is None else PERMISSIONS,
        secret=SECRET if machine is None else "",
    )
    return Plan(before=tuple(before), text=text)


def _machine(profile: Profile) -> SignIn | None:
    """Return the login that a job signs in to by itself, where keys are minted with one."""
    for one in profile.logins:
        if one.unattended and one.settings["jwt"] == GITHUB:
            return one
    return None


def _configuration(profile: Profile, machine: SignIn | None) -> list[str]:
    """Return the runner's whole configuration: the profile, with what is there in place of here."""
    table: dict[str, Any] = {k: v for k, v in profile.raw.items() if k not in LEFT_OUT}
    source = {k: v for k, v in table["source"].items() if k not in ("admin", "login")}
    source |= {"admin": {"env": ADMIN}} if machine is None else {"login": machine.name}
    table = {**table, "export": "paste", "source": {**source, "lifetime": f"{MINUTES}m"}}
    lines = ["[cache]", 'key = "file"', *table_lines(("profiles", profile.name), table)]
    if machine is not None:
        lines += table_lines(("logins", machine.name), machine.raw)
    return [line for line in lines if line]


def _yaml(values: dict[str, str]) -> list[str]:
    """Write a mapping; a JSON string is one of YAML's too."""
    return [f"{name}: {json.dumps(value)}" for name, value in values.items()]


def _indented(lines: list[str], by: int) -> str:
    return "\n".join(" " * by + line for line in lines)
