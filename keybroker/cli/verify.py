"""verify: a profile's key at its gateway, in the forms that Claude Code sends."""

import json
import os
import shlex
import sys
from datetime import timedelta
from typing import Any

import click

from keybroker import client, forms
from keybroker.cli.base import Duration, coloured, for_profile, print_json, progress
from keybroker.cli.look import End, Look, Seen, is_optional, models, took
from keybroker.cli.work import configuration, state
from keybroker.config import Profile
from keybroker.pool import Pool, variables
from keybroker.troubles import TROUBLES

LONGEST = timedelta(seconds=30)
WIDTHS = (26, 27, 28, 7)


@click.command("verify")
@for_profile
@click.option("--model", metavar="NAME", help="The model that is asked for.")
@click.option("--deep", is_flag=True, help="Send what a session sends, some 90 KB, as well.")
@click.option("--print", "show", is_flag=True, help="Show the request for a shell; send nothing.")
@click.option("--timeout", type=Duration(), default=LONGEST, help="The longest one answer takes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_command(
    profile: str | None,
    model: str | None,
    deep: bool,
    show: bool,
    timeout: timedelta,
    as_json: bool,
) -> None:
    """Send PROFILE's gateway the requests that Claude Code sends, with the current key.

    Each is for one token: with the key in both headers and in each alone, streamed, and counted.
    What was refused is named, with what to do about it. The key is never shown.
    """
    config = configuration()
    wanted = config.profile(profile)
    if show:
        if deep or as_json:
            raise click.UsageError("--print shows the one-token request alone")
        print(_printed(wanted, model or models(wanted)[0]))
        return
    if timeout <= timedelta(0):
        raise click.UsageError("--timeout: expected a time")
    with progress("getting the key"):
        secret = client.get(wanted.name)
    pool = Pool(state(), os.environ, None, variables(config))
    asked = [model] if model else models(wanted)
    report = _Report(wanted, as_json=as_json)
    look = Look(wanted, secret, asked, pool, timeout, report.row)
    try:
        look.plain()
        if deep and look.works:
            look.deep()
    finally:
        pool.close()
    report.close(look, look.end(deep=deep))


class _Report:
    """Prints a line for each request as it was answered, and the rest at the end."""

    def __init__(self, profile: Profile, *, as_json: bool) -> None:
        self._profile, self._quiet = profile, as_json
        self._rows: list[dict[str, Any]] = []

    def row(self, form: str, seen: Seen) -> None:
        kind = forms.FORMS[form]
        self._rows.append({"form": form, "key_in": list(kind.key_in), **seen})
        if self._quiet:
            return
        if len(self._rows) == 1:
            _print_row("REQUEST", "KEY IN", "ANSWER", "MS", "REQUEST ID")
        colour = "green" if took(seen) else "red"
        if form in ("no key", "beta", "version") or is_optional(form, seen):
            colour = ""
        key_in = " and ".join(kind.key_in) or "no key"
        answer, ms = _answer(form, seen), str(seen["ms"])
        _print_row(kind.sent, key_in, answer, ms, seen["request_id"], colour)

    def close(self, look: Look, end: End) -> None:
        """
        Say what came of it.

        Raises:
            KeybrokerError: It does not work.
        """
        if self._quiet:
            print_json(self._data(look, end))
        else:
            _print_found(look)
        if end.problem is not None:
            raise end.problem(f"verify: {end.line}", hint=end.todo)
        if not self._quiet:
            print(f"{coloured('works', 'green')}: {end.line}")
            print(f"next: {end.todo}")

    def _data(self, look: Look, end: End) -> dict[str, Any]:
        troubles = [
            {
                "row": one.trouble.row,
                "id": one.trouble.id,
                "title": one.trouble.title,
                "seen": one.seen,
                "shown": list(one.trouble.shown),
                "why": one.trouble.why,
                "remedy": one.trouble.remedy,
                "configuration": one.lines,
            }
            for one in look.found
        ]
        return {
            "profile": self._profile.name,
            "base_url": self._profile.base_url,
            "model": look.model,
            "works": end.problem is None,
            "conclusion": end.line,
            "next": end.todo,
            "reads": look.reads,
            "facts": look.facts,
            "troubles": troubles,
            "requests": self._rows,
        }


def _print_found(look: Look) -> None:
    print()
    for name, text in look.facts.items():
        print(f"{name:<18} {text}")
    for one in look.found:
        trouble = one.trouble
        print(f"row {trouble.row}, {coloured(trouble.title, 'red')}: {one.seen}")
        print(f"  why  {trouble.why}")
        print(f"  do   {trouble.remedy}")
        for line in one.lines:
            print(f"         {line}")
    sys.stdout.flush()  # what comes next is on stderr, if something does not work


def _answer(form: str, seen: Seen) -> str:
    """Say an answer in a few words."""
    status, kind = seen["status"], seen["seen"]
    if kind == "none":
        return "no answer"
    if kind == "ok":
        of_message = form not in ("count_tokens", "openai")
        return f"{status}, msg_… and content" if of_message else f"{status}"
    if kind == "odd":
        return f"{status}, an id without msg_"
    if kind == "model":
        return f"{status}, names the model"
    if is_optional(form, seen):
        return f"{status}, not served (optional)"
    if kind == "trouble" and form not in ("no key", "beta", "version"):
        return f"{status}, row {TROUBLES[seen['trouble']].row}"
    return f"{status}"


def _print_row(sent: str, key_in: str, answer: str, ms: str, tag: str, colour: str = "") -> None:
    a, b, c, d = WIDTHS
    said = f"{answer:<{c}}"
    shown = coloured(said, colour) if colour else said
    print(f"{sent:<{a}} {key_in:<{b}} {shown} {ms:>{d}}  {tag}".rstrip(), flush=True)


def _printed(profile: Profile, model: str) -> str:
    """Write the one-token request for sh and for PowerShell; the key comes from `get`."""
    path, headers, body = forms.request("message", profile.claude, model)
    url = f"{profile.base_url}{path}"
    text = json.dumps(body, separators=(",", ":"))
    rest = {"content-type": "application/json", **headers, **profile.headers}
    lines = [f"  -H {shlex.quote(f'{name}: {value}')} \\" for name, value in rest.items()]
    ca = f" --cacert {shlex.quote(profile.ca)}" if profile.ca else ""
    given = "; ".join(
        f"{_quoted(name)} = {_quoted(value)}"
        for name, value in {**headers, **profile.headers}.items()
    )
    # the key goes through a pipe: arguments can be read by others
    return "\n".join(
        (
            "# sh",
            f"key=$(keybroker get {profile.name}) &&",
            r"printf 'authorization: Bearer %s\nx-api-key: %s\n' " + '"$key" "$key" |',
            f"curl -sS -H @-{ca} \\",
            *lines,
            f"  -d {shlex.quote(text)} \\",
            f"  {shlex.quote(url)}",
            "",
            "# PowerShell",
            f"$key = keybroker get {profile.name}",
            f"$headers = @{{ {given} }}",
            "$headers['authorization'] = \"Bearer $key\"; $headers['x-api-key'] = $key",
            "Invoke-RestMethod -Method Post -ContentType 'application/json' -Headers $headers `",
            f"  -Uri {_quoted(url)} `",
            f"  -Body {_quoted(text)}",
        )
    )


def _quoted(text: str) -> str:
    """Quote for PowerShell."""
    return "'" + text.replace("'", "''") + "'"
