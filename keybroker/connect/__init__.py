"""Other programs' settings: what each surface of Claude Code needs, done and undone."""

from importlib import import_module
from typing import Any

# What can be connected, and in a few words what it is.
SURFACES = {
    "claude": "Claude Code on the command line",
    "bedrock": "Claude Code, to a gateway in Amazon Bedrock's format",
    "vertex": "Claude Code, to a gateway in Google Vertex AI's format",
    "foundry": "Claude Code, to a gateway in place of Microsoft Foundry",
    "aws": "Claude Code, to a gateway in place of Claude Platform on AWS",
    "vscode": "Claude Code in VS Code, Cursor and others of its kind",
    "desktop": "Claude Desktop with inference at the gateway",
    "github-actions": "Claude Code in a workflow: prints its steps",
    "agent-sdk": "the Agent SDK: prints what a program passes to it",
    "opencode": "OpenCode, with a key of its own in a file",
    "cursor": "Cursor's own models: prints what to paste",
    "fazm": "Fazm and other hosts of Claude Code: prints what to paste",
}


def surface(name: str) -> Any:
    """Return the module of a surface."""
    return import_module(f"keybroker.connect.{name.replace('-', '_')}")
