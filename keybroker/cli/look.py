"""A look at a gateway as Claude Code uses it: which requests, and what follows from the answers.

Only statuses, flags and rows of `troubles` are looked at here: no answer's body leaves the worker.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from keybroker import forms
from keybroker.cli.base import progress
from keybroker.config import Profile
from keybroker.credential import Secret
from keybroker.errors import ConfigError, KeybrokerError, SourceDenied, SourceUnavailable
from keybroker.pool import Pool
from keybroker.rotation import Kind
from keybroker.troubles import TROUBLES, Trouble

MODEL = "claude-sonnet-4-6"  # of a session, where nobody named one
DEEP = 4  # times as long: a session's request is read before it is answered
BOTH = "authorization and x-api-key"
NO_ROUTE = (404, 405, 501)
CANNOT_TELL = "cannot tell"
# What tells something about the gateway, and may fail without a session noticing.
PROBES = ("authorization", "x-api-key", "no key", "count_tokens", "openai", "beta", "version")
Seen = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """What came of it in one line, what to type next, and which error it is, if it is one."""

    line: str
    todo: str
    problem: type[KeybrokerError] | None = None


@dataclass(slots=True)
class Found:
    """A row of the table, in which answers it was seen, and what to write against it."""

    trouble: Trouble
    seen: str
    lines: list[str]


def models(profile: Profile) -> list[str]:
    """Return the models to ask for: the next one if the gateway does not know the one before."""
    named = [profile.claude[tier] for tier in ("sonnet", "opus", "haiku") if tier in profile.claude]
    return list(dict.fromkeys([*named, MODEL, profile.verify_model]))


class Look:
    """
    The requests to one gateway, and what follows from the answers.

    Attributes:
        model: The one that is asked for.
        seen: What came of each form, in the order of asking.
        facts: What was learnt, by what it is about.
        found: The rows that were seen; after `end`.
    """

    def __init__(
        self,
        profile: Profile,
        secret: Secret,
        models: list[str],
        pool: Pool,
        timeout: timedelta,
        told: Callable[[str, Seen], None],
    ) -> None:
        """
        Say whom to ask; nothing is sent yet.

        Args:
            models: To ask for, the next one where the one before is not known.
            timeout: The longest one answer may take; of a session's, `DEEP` times as long.
            told: Is told of each form and what came of it.
        """
        self._profile, self._secret, self._pool, self._timeout = profile, secret, pool, timeout
        self._models, self._told = models, told
        self.model = models[0]
        self.seen: dict[str, Seen] = {}
        self.facts: dict[str, str] = {}
        self.found: list[Found] = []

    @property
    def reads(self) -> list[str]:
        """The headers that the gateway was seen to take the key from, each alone."""
        return [one for one in ("authorization", "x-api-key") if took(self.seen.get(one))]

    @property
    def works(self) -> bool:
        """Whether the plain message and the streamed one were answered, and TLS is no trouble."""
        streamed = self.seen.get("stream", {"seen": "none"})
        return took(self.seen["message"]) and took(streamed)

    def plain(self) -> None:
        """Ask for one token in each form."""
        first = self._ask("message")
        while first["seen"] == "model" and self.model != self._models[-1]:
            self.model = self._models[self._models.index(self.model) + 1]
            first = self._ask("message")
        if first["seen"] == "none":
            return
        no_api = first["status"] in NO_ROUTE or first.get("trouble") == "no-api"
        if no_api and not took(first):
            self._ask("openai")
            return
        if took(first) or first.get("trouble") == "key-refused":
            alone = [self._ask("authorization"), self._ask("x-api-key")]
            if all(took(one) for one in alone):
                self._ask("no key")
            self.facts["key"] = self._headers()
        if took(first):
            self._ask("stream")
            self._ask("count_tokens")
        self._trust()

    def deep(self) -> None:
        """Send what a session sends; where that is refused, each of its parts alone."""
        session = self._ask("session", DEEP)
        if session["seen"] == "model":
            return
        if not took(session):
            for part in forms.parts(self._profile.claude, self.model):
                self._ask(part, DEEP)
        self.facts["anthropic-beta"] = self._beta()
        self.facts["anthropic-version"] = self._version()

    def end(self, *, deep: bool) -> End:
        """Say what came of it."""
        for form, seen in self.seen.items():
            if (trouble := self._trouble(form, seen)) is not None:
                said = f"{seen['status'] or 'no answer'} to {_sent(form)}"
                if trouble.row in (5, 6, 7):
                    said += f", naming {_named(seen)}"
                self._find(trouble, said, self._lines(trouble, form, seen))
        return self._bad() or self._good(deep=deep)

    def _good(self, *, deep: bool) -> End:
        first, name = self.seen["message"], self._profile.name
        if first["seen"] == "model":
            line = f"address and key are right; the gateway does not know the model {self.model}"
            if deep:
                todo = f"keybroker verify --deep --model NAME {name}, NAME being one that it has"
                return End(line, todo, ConfigError)
            return End(line, f"keybroker verify --model NAME {name}, NAME being one that it has")
        taken_in = self._only() or BOTH
        line = f"the gateway took the key in {taken_in} and answered in {first['ms']} ms"
        if first["request_id"]:
            line += f" (request {first['request_id']})"
        if first["seen"] == "odd":
            line += "; its messages have ids of another kind than msg_…, which Claude Code takes"
        if not deep:
            return End(line, f"keybroker verify --deep {name}, which sends what a session sends")
        return End(f"{line}, and what a session sends", f"keybroker connect --profile {name}")

    def _bad(self) -> End | None:
        """Return the end of it where something does not work."""
        first = self.seen["message"]
        if "openai" in self.seen and self.seen["openai"]["seen"] == "ok":
            host = urlsplit(self._profile.base_url).netloc
            line = f"{host} speaks OpenAI's API alone: /v1/chat/completions answers, "
            line += f"/v1/messages does not ({first['status']})"
            hint = "Claude Code needs a gateway that answers POST /v1/messages, such as LiteLLM"
            return End(line, hint, ConfigError)
        for form, seen in self.seen.items():
            if seen["seen"] == "none" and form not in PROBES:
                return self._unreachable(form, seen)
        told = [one for one in self.found if one.trouble.id != "certificate"]  # we trust it
        if told:
            trouble = told[0].trouble
            more = f", and {len(told) - 1} more" if len(told) > 1 else ""
            line = f"{trouble.title}: {told[0].seen}{more}"
            if trouble.id == "key-refused" and (only := self._only()):
                line = f"the key is taken in {only} alone, and refused in both headers at once"
            return End(line, self._todo(trouble), _class_of(trouble))
        for form in ("message", "stream", "session"):
            if form in self.seen and self.seen[form]["seen"] == "other":
                return _other(form, self.seen[form])
        return None

    def _unreachable(self, form: str, seen: Seen) -> End:
        line = str(seen["problem"])
        if form != "message":
            line += f", asked for {_sent(form)}; a smaller request was answered"
        hint = seen["hint"] or "try again, or ask who runs the gateway"
        return End(line, hint, ConfigError if seen["untrusted"] else SourceUnavailable)

    def _trouble(self, form: str, seen: Seen) -> Trouble | None:
        """Return the row of an answer that matters."""
        if seen["seen"] == "none" and form == "message":
            return TROUBLES["certificate" if seen["untrusted"] else "nobody-there"]
        if form in PROBES or seen["seen"] not in ("trouble", "other"):
            return None
        if form == "session" and any(
            self.seen[one]["seen"] in ("trouble", "other", "none")
            for one in forms.parts(self._profile.claude, self.model)
            if one in self.seen
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
            if self._profile.kind is Kind.FOLLOWED:
                return f"put the right key where its owner keeps it; keybroker source test {name}"
            return f"keybroker rotate {name}"
        if any(one.lines for one in self.found):
            todo = f"write that, then: keybroker verify --deep {name}; "
            todo += f"keybroker connect --profile {name}"
            return todo
        if trouble.id == "firewall":
            return f"have /v1/messages exempted, then: keybroker verify --deep {name}"
        return f"what is above, then: keybroker verify {name}"

    def _find(self, trouble: Trouble, seen: str, lines: list[str]) -> None:
        for one in self.found:
            if one.trouble is trouble:  # seen in several answers
                one.seen += f"; {seen}"
                one.lines += [line for line in lines if line not in one.lines]
                return
        self.found.append(Found(trouble, seen, lines))

    def _ask(self, form: str, times: int = 1) -> Seen:
        seconds = self._timeout * times
        with progress(f"asking: {_sent(form)}"):
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
        self.seen[form] = seen
        self._told(form, seen)
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
            self.facts["TLS"] = f"{CANNOT_TELL} whether Node trusts the certificate"
        elif found["node"]:
            self.facts["TLS"] = "Node trusts the certificate, too"
        else:
            said = "trusted by the system, and not by Node's own list"
            bundle = found["bundle"]
            file = bundle or "/path/to/authority.pem"
            lines = [f"[profiles.{self._profile.name}]", f"ca = {json.dumps(file)}"]
            self.facts["TLS"] = said
            text = f"{said}; Claude Code's own program asks both, one that runs on Node does not"
            self._find(TROUBLES["certificate"], text, lines)

    def _headers(self) -> str:
        """Say which header the gateway reads."""
        if "no key" in self.seen and took(self.seen["no key"]):
            return "none is asked for: whoever reaches this gateway may use it"
        if (only := self._only()) is not None:
            other = "x-api-key" if only == "authorization" else "authorization"
            return f"{only} is read, {other} is not; Claude Code sends both"
        if took(self.seen["authorization"]):
            return "authorization and x-api-key are both read"
        if took(self.seen["message"]):
            return "both headers are needed"
        return "refused in both headers, and in each alone"

    def _only(self) -> str | None:
        return self.reads[0] if len(self.reads) == 1 else None

    def _beta(self) -> str:
        applied = "applied" in self.seen["session"]["flags"]
        if applied:
            return "reaches the upstream: it applied context_management"
        probe = self._ask("beta")
        if "made-up" in probe["flags"] or (probe["status"] == 400 and "beta" in probe["flags"]):
            return "reaches the upstream: a made-up one was refused by its name"
        fields = self.seen.get("fields")
        if fields is not None and "extra" in fields["flags"] and took(probe):
            return f"{CANNOT_TELL}: context_management is refused, as where it is dropped"
        return CANNOT_TELL

    def _version(self) -> str:
        probe = self._ask("version")
        if probe["status"] == 400 and "version" in probe["flags"]:
            return "reaches the upstream: a made-up one was refused by its name"
        return CANNOT_TELL


def took(seen: Seen | None) -> bool:
    """Whether the gateway took the key; a model that it does not know says so as well."""
    return seen is not None and seen["seen"] in ("ok", "odd", "model")


def is_optional(form: str, seen: Seen) -> bool:
    """Say whether a gateway just does not have what it need not have."""
    return form == "count_tokens" and seen["status"] in NO_ROUTE


def _sent(form: str) -> str:
    return forms.FORMS[form].sent.strip()


def _other(form: str, seen: Seen) -> End:
    """Say what the table has no row for."""
    status, found = seen["status"], seen["flags"]
    what = f"the gateway answers {status} to {_sent(form)}"
    if "budget" in found:
        return End(f"{what}: a budget is used up", "ask who runs the gateway", SourceDenied)
    if "version" in found:
        hint = "have the gateway send it on as it came, and anthropic-beta with it"
        return End(f"{what}: anthropic-version did not reach who answers", hint, ConfigError)
    if status == 429 or status >= 500:
        hint = "try again later; if it stays so, ask who runs the gateway"
        return End(what, hint, SourceUnavailable)
    if status in NO_ROUTE:
        hint = "set base_url to the address of its API, as its documents have it"
        return End(f"{what}: it has no such route", hint, ConfigError)
    return End(what, "ask who runs the gateway, and name the request id", SourceDenied)


def _class_of(trouble: Trouble) -> type[KeybrokerError]:
    if trouble.id in ("key-refused", "firewall"):
        return SourceDenied
    return SourceUnavailable if trouble.id == "nobody-there" else ConfigError


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
