"""service: the daemon under the system's service manager."""

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from keybroker.cli.base import Count, print_json, use_system
from keybroker.cli.daemon import end_daemon
from keybroker.cli.work import configuration
from keybroker.connect.line import helper_line, system_line
from keybroker.connect.proof import prove
from keybroker.errors import ConfigError, NobodyAnswers
from keybroker.services import service_manager
from keybroker.services.manager import content
from keybroker.services.needs import Needs, needs

if TYPE_CHECKING:
    from keybroker.services.launchd import Launchd
    from keybroker.services.systemd import Systemd

SYSTEM = click.option(
    "--system", is_flag=True, help="For all users of a shared host, by the system's own manager."
)


@click.group("service")
def service_command() -> None:
    """Have the daemon run from each login on, kept running by the system."""


@service_command.command("install")
@SYSTEM
@click.option("--dry-run", is_flag=True, help="Show the files that would be written.")
def install_command(system: bool, dry_run: bool) -> None:
    """Write the units, enable and start them, and see that a key comes.

    May be repeated: after an upgrade, or when the configuration needs more than before.
    """
    service, wanted = _manager(system), _needs(system)
    if dry_run:
        for file, text in service.files(wanted).items():
            print(f"--- {file}{'' if content(file) != text else ' (as it is)'}")
            print(text)
        return
    service.check()
    if not system and not service.state(wanted).pid:
        end_daemon()  # one in the background; the service takes its place
    changed = service.write(wanted)
    for file in changed:
        print(f"wrote    {file}")
    service.start(changed)
    print(f"running  process {service.state(wanted).pid}, {service.begins_at}")
    name, fingerprint = _try(system)
    print(f"tried    {name}: the helper printed the key {fingerprint}")
    print(f"undo     keybroker service uninstall{' --system' if system else ''}")


@service_command.command("uninstall")
@SYSTEM
def uninstall_command(system: bool) -> None:
    """Stop the daemon and its socket, and remove the units. Keys and configuration stay."""
    removed = _manager(system).uninstall()
    for file in removed:
        print(f"removed  {file}")
    if not removed:
        print("no service is installed")
        return
    print("keys live on until their end; all of them now: keybroker revoke --all")


@service_command.command("status")
@SYSTEM
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status_command(system: bool, as_json: bool) -> None:
    """Say whether the service is installed, runs, and has what the configuration needs.

    Exit status: 0 when it runs, 69 when it does not.
    """
    service, wanted, problem = _manager(system), None, None
    try:
        wanted = _needs(system)
    except ConfigError as error:  # how the service stands is worth knowing all the same
        problem = error.message
    state = service.state(wanted)
    facts: dict[str, Any] = {
        "manager": service.name,
        "installed": state.installed,
        "current": state.installed and state.current,
        "enabled": state.enabled,
        "active": state.active,
        "pid": state.pid or None,
        "restarts": state.restarts,
        "result": state.result,
        "files": [str(file) for file in service.places if file.exists()],
        "problem": problem,
    }
    if as_json:
        print_json(facts)
    elif not state.installed:
        print("no service is installed; keybroker service install")
    else:
        runs = f"process {state.pid}" if state.pid else "the next helper starts it"
        print(f"{state.active}, {runs}, {service.begins_at}")
        if state.restarts:
            print(f"restarted {state.restarts} times, the last time because of: {state.result}")
        if problem is not None:
            print(problem)
        elif not state.current:
            print("the configuration or keybroker has changed since: keybroker service install")
        for file in facts["files"]:
            print(f"  {file}")
    if state.active not in ("active", "listening"):
        sys.exit(NobodyAnswers.exit_status)


@service_command.command("logs")
@SYSTEM
@click.option("--lines", "-n", type=Count(), default=50, help="How many; 50.")
@click.option("--follow", "-f", is_flag=True, help="Stay, and show what comes.")
def logs_command(system: bool, lines: int, follow: bool) -> None:
    """Show what the daemon said."""
    command = _manager(system).logs(lines, follow=follow)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise NobodyAnswers(f"{command[0]}: cannot be run ({error.strerror})") from None


def _manager(system: bool) -> "Systemd | Launchd":
    if system:
        use_system()
    return service_manager(os.environ, system=system)


def _needs(system: bool) -> Needs:
    config = configuration()
    if not config.profiles:
        config.profile(None)  # it says what to type
    return needs(config, os.environ, system=system)


def _try(system: bool) -> tuple[str, str]:
    """
    Ask for a key as Claude Code does; return the profile and the fingerprint of what came.

    Raises:
        NotReady: None came, and why.
    """
    config = configuration()
    name = config.default or next(iter(config.profiles))
    line = system_line(name) if system else helper_line(name)
    return name, prove(line, {}, os.environ)
