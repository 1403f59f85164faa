"""verify: a profile's key at its gateway, in the forms that Claude Code sends."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import click

from keybroker import client, forms
from keybroker.cli.base import Duration, coloured, for_profile, print_json, progress
from keybroker.cli.work import configuration, state
from keybroker.config import Profile
from keybroker.credential import Secret
from keybroker.errors import ConfigError, KeybrokerError, SourceDenied, SourceUnavailable
from keybroker.pool import Pool, variables
from keybroker.troubles import TROUBLES, Trouble

MODEL = "claude-sonnet-4-6"  # of a session, where nobody named one
LONGEST = timedelta(seconds=30)
DEEP = 4  # times as long: a session's request is read before it is answered
BOTH = "authorization and x-api-key"
NO_ROUTE = (404, 405, 501)
CANNOT_TELL = "cannot tell"
WIDTHS = (26, 27, 28, 7)
Seen = Mapping[str, Any]


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
        print(_printed(wanted, model or _models(wanted)[0]))
        return
    if timeout <= timedelta(0):
        raise click.UsageError("--timeout: expected a time")
    with progress("getting the key"):
        secret = client.get(wanted.name)
    pool = Pool(state(), os.environ, None, variables(config))
    report = _Report(wanted, as_json=as_json)
    look = _Look(wanted, secret, [model] if model else _models(wanted), pool, timeout, report)
    try:
        look.plain()
        if deep and look.works:
            look.deep()
    finally:
        pool.close()
    report.close(look.model, *look.conclusion(deep=deep))


def _models(profile: Profile) -> list[str]:
    """Return the models to ask for: the next one if the gateway does not know the one before."""
    named = [profile.claude[tier] for tier in ("sonnet", "opus", "haiku") if tier in profile.claude]
    return list(dict.fromkeys([*named, MODEL, profile.verify_model]))


class _Report:
    """Prints a line for each request as it was answered, and the rest at the end."""

    def __init__(self, profile: Profile, *, as_json: bool) -> None:
        self.profile, self._quiet = profile, as_json
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, str] = {}
        self.troubles: list[tuple[Trouble, str, list[str]]] = []

    def row(self, form: str, seen: Seen) -> None:
        kind = forms.FORMS[form]
        self.rows.append({"form": form, "key_in": list(kind.key_in), **seen})
        if self._quiet:
            return
        if len(self.rows) == 1:
            _print_row("REQUEST", "KEY IN", "ANSWER", "MS", "REQUEST ID")
        answer = _answer(form, seen)
        key_in = " and ".join(kind.key_in) or "no key"
        colour = {"ok": "green", "odd": "green", "model": "green"}.get(seen["seen"], "red")
        if form in ("no key", "beta", "version") or _is_optional(form, seen):
            colour = ""
        _print_row(kind.sent, key_in, answer, str(seen["ms"]), seen["request_id"], colour)

    def fact(self, name: str, text: str) -> None:
        self.facts[name] = text

    def trouble(self, trouble: Trouble, seen: str, lines: list[str]) -> None:
        for at, (one, before, known) in enumerate(self.troubles):
            if one is trouble:  # seen in several requests
                more = [line for line in lines if line not in known]
                self.troubles[at] = (one, f"{before}; {seen}", [*known, *more])
                return
        self.troubles.append((trouble, seen, lines))

    def close(self, model: str, line: str, todo: str, problem: type[KeybrokerError] | None) -> None:
        """
        Say what came of it.

        Raises:
            KeybrokerError: It does not work.
        """
        if self._quiet:
            troubles = [
                {
                    "row": one.row,
                    "id": one.id,
                    "title": one.title,
                    "seen": seen,
                    "shown": list(one.shown),
                    "why": one.why,
                    "remedy": one.remedy,
                    "configuration": lines,
                }
                for one, seen, lines in self.troubles
            ]
            print_json(
                {
                    "profile": self.profile.name,
                    "base_url": self.profile.base_url,
                    "model": model,
                    "works": problem is None,
                    "conclusion": line,
                    "next": todo,
                    "facts": self.facts,
                    "troubles": troubles,
                    "requests": self.rows,
                }
            )
        else:
            self._print_end()
        if problem is not None:
            raise problem(f"verify: {line}", hint=todo)
        if not self._quiet:
            print(f"{coloured('works', 'green')}: {line}")
            print(f"next: {todo}")

    def _print_end(self) -> None:
        print()
        for name, text in self.facts.items():
            print(f"{name:<18} {text}")
        for one, seen, lines in self.troubles:
            print(f"row {one.row}, {coloured(one.title, 'red')}: {seen}")
            print(f"  why  {one.why}")
            print(f"  do   {one.remedy}")
            for line in lines:
                print(f"         {line}")
        sys.stdout.flush()


class _Look:
    """The requests to one gateway, and what follows from the answers."""

    def __init__(
        self,
        profile: Profile,
        secret: Secret,
        models: list[str],
        pool: Pool,
        timeout: timedelta,
        report: _Report,
    ) -> None:
        self._profile, self._secret, self._pool, self._timeout = profile, secret, pool, timeout
        self._models, self._report = models, report
        self._seen: dict[str, Seen] = {}
        self.model = models[0]

    @property
    def works(self) -> bool:
        """Whether the plain message and the streamed one were answered, and TLS is no trouble."""
        streamed = self._seen.get("stream", {"seen": "none"})
        return _took(self._seen["message"]) and _took(streamed)

    def plain(self) -> None:
        """Ask for one token in each form."""
        first = self._ask("message")
        while first["seen"] == "model" and self.model != self._models[-1]:
            self.model = self._models[self._models.index(self.model) + 1]
            first = self._ask("message")
        if first["seen"] == "none":
            return
        no_api = first["status"] in NO_ROUTE or first.get("trouble") == "no-api"
        if no_api and not _took(first):
            self._ask("openai")
            return
        if _took(first) or first.get("trouble") == "key-refused":
            alone = [self._ask("authorization"), self._ask("x-api-key")]
            if all(_took(one) for one in alone):
                self._ask("no key")
            self._report.fact("key", self._headers())
        if _took(first):
            self._ask("stream")
            self._ask("count_tokens")
        self._trust()

    def deep(self) -> None:
        """Send what a session sends; where that is refused, each of its parts alone."""
        session = self._ask("session", DEEP)
        if session["seen"] == "model":
            return
        if not _took(session):
            for part in forms.parts(self._profile.claude, self.model):
                self._ask(part, DEEP)
        self._report.fact("anthropic-beta", self._beta())
        self._report.fact("anthropic-version", self._version())

    def conclusion(self, *, deep: bool) -> tuple[str, str, type[KeybrokerError] | None]:
        """Return the last line, what to type next, and which error it is, if it is one."""
        for form, seen in self._seen.items():
            if (trouble := self._trouble(form, seen)) is not None:
                lines = self._lines(trouble, form, seen)
                said = f"{seen['status'] or 'no answer'} to {forms.FORMS[form].sent.strip()}"
                if seen["flags"] and trouble.row in (5, 6, 7):
                    said += f", naming {_named(seen)}"
                self._report.trouble(trouble, said, lines)
        if (bad := self._bad()) is not None:
            return bad
        first = self._seen["message"]
        if first["seen"] == "model":
            line = f"address and key are right; the gateway does not know the model {self.model}"
            if deep:
                return line, "keybroker verify --deep --model NAME, one that it has", ConfigError
            return line, "keybroker verify --model NAME, one that it has", None
        line = f"the gateway took the key in {self._taken_in()} and answered in {first['ms']} ms"
        if first["request_id"]:
            line += f" (request {first['request_id']})"
        if first["seen"] == "odd":
            line += "; its messages have ids of another kind than msg_…, which Claude Code takes"
        if not deep:
            return line, "keybroker verify --deep, which sends what a session sends", None
        return f"{line}, and what a session sends", "keybroker connect", None

    def _bad(self) -> tuple[str, str, type[KeybrokerError]] | None:
        """Return the end of it where something does not work."""
        first = self._seen["message"]
        host = urlsplit(self._profile.base_url).netloc
        if self._seen.get("openai", first)["seen"] == "ok" and "openai" in self._seen:
            line = f"{host} speaks OpenAI's API alone: /v1/chat/completions answers, "
            line += f"/v1/messages does not ({first['status']})"
            hint = "Claude Code needs a gateway that answers POST /v1/messages, such as LiteLLM"
            return line, hint, ConfigError
        for form, seen in self._seen.items():
            if seen["seen"] == "none":
                return self._unreachable(form, seen)
        answered = self._seen["message"]["seen"] != "none"  # so we trust its certificate
        told = [
            (one, text)
            for one, text, _ in self._report.troubles
            if one.id != "certificate" or not answered
        ]
        if told:
            trouble, text = told[0]
            more = f", and {len(told) - 1} more" if len(told) > 1 else ""
            line = f"{trouble.title}: {text}{more}"
            if trouble.id == "key-refused" and (only := self._only()):
                line = f"the key is taken in {only} alone, and refused in both headers at once"
            return line, self._todo(trouble), _class_of(trouble)
        for form in ("message", "stream", "session"):
            if form in self._seen and self._seen[form]["seen"] == "other":
                return self._other(form, self._seen[form])
        return None

    def _unreachable(self, form: str, seen: Seen) -> tuple[str, str, type[KeybrokerError]]:
        hint = seen["hint"] or "try again, or ask who runs the gateway"
        line = str(seen["problem"])
        if form != "message":
            line += f", asked for {forms.FORMS[form].sent.strip()}; a smaller request was answered"
        return line, hint, ConfigError if seen["untrusted"] else SourceUnavailable

    def _other(self, form: str, seen: Seen) -> tuple[str, str, type[KeybrokerError]]:
        status, found = seen["status"], seen["flags"]
        what = f"the gateway answers {status} to {forms.FORMS[form].sent.strip()}"
        if "budget" in found:
            return f"{what}: a budget is used up", "ask who runs the gateway", SourceDenied
        if "version" in found:
            hint = "have the gateway send it on as it came, and anthropic-beta with it"
            return f"{what}: anthropic-version did not reach who answers", hint, ConfigError
        if status == 429 or status >= 500:
            return (
                what,
                "try again later; if it stays so, ask who runs the gateway",
                SourceUnavailable,
            )
        if status in NO_ROUTE:
            hint = "set base_url to the address of its API, as its documents have it"
            return f"{what}: it has no such route", hint, ConfigError
        return what, "ask who runs the gateway, and name the request id", SourceDenied

    def _trouble(self, form: str, seen: Seen) -> Trouble | None:
        """Return the row of an answer that matters."""
        if seen["seen"] == "none" and form == "message":
            return TROUBLES["certificate" if seen["untrusted"] else "nobody-there"]
        probes = ("authorization", "x-api-key", "no key", "count_tokens", "openai")
        if form in (*probes, "beta", "version") or seen["seen"] not in ("trouble", "other"):
            return None
        if form == "session" and any(
            self._seen[one]["seen"] in ("trouble", "other", "none")
            for one in forms.parts(self._profile.claude, self.model)
            if one in self._seen
        ):
            return None  # its parts say it better
        if form != "message" and seen["status"] in (403, 406, 413):  # a smaller one was taken
            return TROUBLES["firewall"]
        return TROUBLES.get(seen.get("trouble", ""))

    def _lines(self, trouble: Trouble, form: str, seen: Seen) -> list[str]:
        """Return what to write into the configuration, beside what stands there already."""
        name, claude = self._profile.name, self._profile.claude
        keys = [key for key in trouble.keys if key not in claude or trouble.row == 7]
        if trouble.id == "thinking" and not forms.may_choose(self.model):
            keys = []
        if trouble.id == "fields" and form == "effort":  # what that key does not take away
            keys = []
        if trouble.id == "too-long":
            of_answer = form == "output" or "context" not in seen["flags"]
            keys = ["max_output_tokens" if of_answer else "auto_compact_window"]
        return trouble.lines(name, keys)

    def _todo(self, trouble: Trouble) -> str:
        name = self._profile.name
        if trouble.id == "key-refused":
            return f"keybroker rotate {name}; keybroker source test {name} says where it stops"
        if trouble.id == "certificate":
            return f"keybroker connect, once ca is set in [profiles.{name}]"
        if any(lines for _, _, lines in self._report.troubles):
            return f"write that, then: keybroker verify --deep {name}, keybroker connect"
        return "what is above; then the same command again"

    def _ask(self, form: str, times: int = 1) -> Seen:
        seconds = self._timeout * times
        with progress(f"asking: {forms.FORMS[form].sent.strip()}"):
            seen = self._pool.call(
                self._profile.type,
                "try_form",
                seconds.total_seconds() + 5,
                profile=self._profile,
                secret=self._secret,
                form=form,
                model=self.model,
                timeout=seconds,
            )
        self._seen[form] = seen
        self._report.row(form, seen)
        return seen

    def _trust(self) -> None:
        """Say whether Node trusts the certificate that we do."""
        if urlsplit(self._profile.base_url).scheme != "https":
            return
        extra = os.environ.get("NODE_EXTRA_CA_CERTS") or None
        with progress("asking whether Node trusts it"):
            found = self._pool.call(
                self._profile.type,
                "trusts",
                6 * self._timeout.total_seconds(),
                profile=self._profile,
                extra=extra,
                timeout=self._timeout,
            )
        if found["node"] is None:
            self._report.fact("TLS", f"{CANNOT_TELL} whether Node trusts the certificate")
        elif found["node"]:
            self._report.fact("TLS", "Node trusts the certificate, too")
        else:
            said = "trusted by the system, and not by Node's own list"
            bundle = found["bundle"]
            file = bundle or "/path/to/authority.pem"
            lines = [f"[profiles.{self._profile.name}]", f"ca = {json.dumps(file)}"]
            self._report.fact("TLS", said)
            text = f"{said}; Claude Code's own program asks both, one that runs on Node does not"
            self._report.trouble(TROUBLES["certificate"], text, lines)

    def _headers(self) -> str:
        """Say which header the gateway reads."""
        if "no key" in self._seen and _took(self._seen["no key"]):
            return "none is asked for: whoever reaches this gateway may use it"
        if (only := self._only()) is not None:
            other = "x-api-key" if only == "authorization" else "authorization"
            return f"{only} is read, {other} is not; Claude Code sends both"
        if _took(self._seen["authorization"]):
            return "authorization and x-api-key are both read"
        if _took(self._seen["message"]):
            return "both headers are needed"
        return "refused in both headers, and in each alone"

    def _taken_in(self) -> str:
        return self._only() or BOTH

    def _only(self) -> str | None:
        took = [one for one in ("authorization", "x-api-key") if _took(self._seen.get(one))]
        return took[0] if len(took) == 1 else None

    def _beta(self) -> str:
        applied = "applied" in self._seen["session"]["flags"]
        if applied:
            return "reaches the upstream: it applied context_management"
        probe = self._ask("beta")
        if "made-up" in probe["flags"] or (probe["status"] == 400 and "beta" in probe["flags"]):
            return "reaches the upstream: a made-up one was refused by its name"
        fields = self._seen.get("fields")
        if fields is not None and "extra" in fields["flags"] and _took(probe):
            return f"{CANNOT_TELL}: context_management is refused, as where it is dropped"
        return CANNOT_TELL

    def _version(self) -> str:
        probe = self._ask("version")
        if probe["status"] == 400 and "version" in probe["flags"]:
            return "reaches the upstream: a made-up one was refused by its name"
        return CANNOT_TELL


def _took(seen: Seen | None) -> bool:
    """Whether the gateway took the key; a model that it does not know says so as well."""
    return seen is not None and seen["seen"] in ("ok", "odd", "model")


def _class_of(trouble: Trouble) -> type[KeybrokerError]:
    if trouble.id in ("key-refused", "firewall"):
        return SourceDenied
    return SourceUnavailable if trouble.id == "nobody-there" else ConfigError


def _is_optional(form: str, seen: Seen) -> bool:
    return form == "count_tokens" and seen["status"] in NO_ROUTE


def _named(seen: Seen) -> str:
    words = {
        "context_management": "context_management",
        "adaptive": "adaptive",
        "thinking": "thinking",
        "extra": "extra inputs",
        "beta": "anthropic-beta",
        "output": "max_tokens",
        "context": "a context limit",
    }
    return ", ".join(words[one] for one in words if one in seen["flags"]) or "a field"


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
    if _is_optional(form, seen):
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
