"""audit: who was given which key, and what became of it."""

import json
from datetime import datetime
from typing import Any

import click

from keybroker.audit import Audit
from keybroker.cli.base import Count, profiles
from keybroker.cli.work import state


@click.group("audit", invoke_without_command=True)
@click.option("--profile", shell_complete=profiles, help="Only this profile.")
@click.option(
    "--last",
    type=Count(),
    default=50,
    show_default=True,
    help="How many lines; 0 for all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are kept.")
@click.pass_context
def audit_command(ctx: click.Context, profile: str | None, last: int, as_json: bool) -> None:
    """Show who was given which key, and what was minted, verified, retired and revoked."""
    if ctx.invoked_subcommand is not None:
        return
    lines = Audit(state()).read()
    if profile is not None:
        lines = [line for line in lines if line.get("profile") == profile]
    for line in lines[-last:] if last > 0 else lines:
        print(json.dumps(line) if as_json else _said(line))


@audit_command.command("verify")
def verify() -> None:
    """Check that every line follows from the one before it. Exit status: 0, or 69."""
    audit = Audit(state())
    count = len(audit.read())
    files = audit.files()
    print(f"ok: {count} lines in {len(files)} file{'' if len(files) == 1 else 's'}")


def _said(line: dict[str, Any]) -> str:
    told = ("n", "at", "event", "profile", "prev", "fingerprint")
    when = datetime.fromisoformat(line["at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    rest = "  ".join(f"{k}={v}" for k, v in line.items() if k not in told and v != "")
    what = f"{line['profile']:<10}  {line['event']:<9}  {line.get('fingerprint', ''):<8}"
    return f"{when}  {what}  {rest}".rstrip()
