"""source test: the whole life of one key against the real thing, step by step."""

import click

from keybroker.cli.base import for_profile, print_json
from keybroker.cli.trial import Report, try_out
from keybroker.cli.work import configuration, desk, have_tried_again, owner


@click.group("source")
def source_command() -> None:
    """Try a source against the real thing."""


@source_command.command("test")
@for_profile
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(profile: str | None, as_json: bool) -> None:
    """Mint a key at PROFILE's source, verify it, find it, revoke it, and see it refused.

    Says which step fails and what was seen. The key is of its own: the current one is not touched.
    A source whose keys somebody else rotates is read and verified. Where keys are published is read
    too; nothing is written there.
    """
    config = configuration()
    wanted = config.profile(profile)
    report = Report(as_json)
    try:
        with owner() as lock, desk(config, lock=lock, only=wanted) as at:
            try_out(at, wanted, report)
        have_tried_again(wanted.name)
    finally:
        if as_json:
            print_json(report.rows)
