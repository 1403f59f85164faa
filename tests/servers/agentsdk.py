"""
The real Agent SDK for Python, with a client of ours in place of the one that it brings.

See: https://code.claude.com/docs/en/agent-sdk/python
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.claude import environment
from tests.servers.install import agent_sdk_folder, claude_program, installed

_PROGRAM = """
import anyio, json, sys
from claude_agent_sdk import ClaudeAgentOptions, ResultError, ResultMessage, query

async def ask(options):
    try:
        async for message in query(prompt="ping", options=ClaudeAgentOptions(**options)):
            if isinstance(message, ResultMessage):
                return message.result
    except ResultError as error:
        return f"error: {error}"

async def main():
    print(json.dumps([await ask(options) for options in json.load(sys.stdin)]))

anyio.run(main)
"""


def ask_agent_sdk(
    version: str, home: Path, *asked: Mapping[str, Any], env_extra: Mapping[str, str] | None = None
) -> list[str]:
    """
    Run a program that uses the SDK.

    Args:
        version: Of the client; one of `claude.VERSIONS`.
        home: Its HOME; its project is the folder `project` below it.
        asked: One question with each, which are what `ClaudeAgentOptions` takes.
        env_extra: Added to the program's environment.

    Returns:
        The answers, one after another, or what went wrong.
    """
    project = home / "project"
    project.mkdir(exist_ok=True)
    python = installed(agent_sdk_folder()) / "bin" / "python"
    client = {"cli_path": str(claude_program(version))}
    done = subprocess.run(
        [str(python), "-c", _PROGRAM],
        cwd=project,
        env=environment(home, env_extra),
        input=json.dumps([{**client, **options} for options in asked]),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers
