"""A gateway asked as Claude Code asks it, in one of `forms`; what it answered, without its words.

What was refused leaves here as flags and as a row of `troubles`: a body never does.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from keybroker import forms
from keybroker.config import Profile
from keybroker.credential import Secret
from keybroker.errors import ConfigError, SourceError
from keybroker.sources.http import UNTRUSTED, Http, Reply
from keybroker.troubles import flags, name, says_model

REQUEST_IDS = ("request-id", "x-request-id", "x-litellm-call-id", "cf-ray", "x-amzn-requestid")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:=+/-]{1,80}")


class Messages:
    """Asks one profile's gateway."""

    def __init__(self, profile: Profile, seconds: float) -> None:
        """
        Say whom to ask; nothing is opened before the first request.

        Args:
            seconds: The longest that one request may take.
        """
        self._profile = profile
        self._http = Http(
            "gateway",
            profile.base_url,
            ca=profile.ca,
            headers=profile.headers,
            seconds=seconds,
        )

    def ask(self, form: str, secret: Secret, model: str) -> dict[str, Any]:
        """
        Send one request in one of `forms.FORMS`.

        Returns:
            `seen` is what came of it: ok; odd, which is a message with an id of another kind;
            model, when that alone was refused; trouble, with its row's `trouble`; other; or none,
            with `problem`, `hint` and `untrusted`. `status` (None without an answer), `ms`,
            `request_id` (empty without one), `flags`, and `skew_s`, by which its clock is ahead.

        Raises:
            ConfigError: The `ca` file cannot be used.
        """
        path, headers, body = forms.request(form, self._profile.claude, model)
        for header in forms.FORMS[form].key_in:
            scheme = "Bearer " if header == "authorization" else ""
            headers[header] = f"{scheme}{secret.reveal()}"
        started = time.perf_counter()
        try:
            reply = self._http.call(
                "POST", path, headers=headers, body=body, redirect_is_reply=True
            )
        except SourceError as error:
            return {
                "seen": "none",
                "status": None,
                "ms": _since(started),
                "request_id": "",
                "flags": [],
                "problem": error.message.removeprefix("gateway: "),
                "hint": error.hint,
                "untrusted": error.message.endswith(UNTRUSTED),
            }
        return {
            "status": reply.status,
            "ms": _since(started),
            "request_id": _request_id(reply, secret),
            "skew_s": round(reply.skew.total_seconds()),
            **_judged(form, reply, streams=body.get("stream") is True),
        }

    def trusts(self, extra: str | None) -> dict[str, Any]:
        """
        Say whether Node trusts the gateway's certificate, too: it does not ask the system.

        Args:
            extra: What NODE_EXTRA_CA_CERTS names, where it is set.

        Returns:
            `node`: whether it does by its own list and what it was given; None where that cannot
            be told. `bundle`: the system's PEM file with which it would; None: no such file.
        """
        if urlsplit(self._profile.base_url).scheme != "https":
            return {"node": None, "bundle": None}
        given = [] if self._profile.ca is None else [self._profile.ca]
        if extra is not None:
            with suppress(ConfigError):  # Node does without a file that it cannot read
                if self._is_trusted([*given, extra]):
                    return {"node": True, "bundle": None}
        node = self._is_trusted(given)
        bundles = Http.system_bundles() if node is False else []
        bundle = next((one for one in bundles if self._is_trusted([one])), None)
        return {"node": node, "bundle": bundle}

    def close(self) -> None:
        self._http.close()

    def _is_trusted(self, authorities: list[str]) -> bool | None:
        http = Http("gateway", self._profile.base_url, seconds=self._http.seconds)
        http.only = authorities
        try:
            http.call("HEAD", "/", redirect_is_reply=True)
        except SourceError as error:
            return False if error.message.endswith(UNTRUSTED) else None
        finally:
            http.close()
        return True


def _since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _request_id(reply: Reply, secret: Secret) -> str:
    """Return what the gateway calls the request, unless it could be something else."""
    for header in REQUEST_IDS:
        value = reply.headers.get(header, "")
        if _REQUEST_ID.fullmatch(value) and secret.reveal() not in value:
            return value
    return ""


def _judged(form: str, reply: Reply, *, streams: bool) -> dict[str, Any]:
    """Say what an answer is, without a word of it."""
    text = reply.data.decode("utf-8", "replace")
    found = flags(reply.headers.get("content-type", ""), text)
    status, seen = reply.status, ""
    if status == 200 and streams:
        events = list(_events(text))
        seen = _of_events(events)
        found |= {"applied"} if any("context_management" in one for one in events) else set()
        if (
            problem := next((one for one in events if one.get("type") == "error"), None)
        ) is not None:
            found |= flags("application/json", json.dumps(problem))
            status = 400 if seen != "ok" else status  # it came after the status was sent
    elif status == 200:
        seen = _of_value(form, reply.value)
        if isinstance(reply.value, dict) and "context_management" in reply.value:
            found |= {"applied"}
    answer: dict[str, Any] = {"seen": seen, "flags": sorted(found)}
    if seen:
        return answer
    if says_model(status, found):
        return {**answer, "seen": "model"}
    row = name(status, found)
    return (
        {**answer, "seen": "other"}
        if row is None
        else {**answer, "seen": "trouble", "trouble": row.id}
    )


def _of_value(form: str, value: Any) -> str:
    """Return ok or odd where a 200 holds what was asked for; else nothing."""
    if not isinstance(value, dict):
        return ""
    if form == "count_tokens":
        return "ok" if isinstance(value.get("input_tokens"), int) else ""
    if form == "openai":
        return "ok" if "choices" in value else ""
    return _of_message(value)


def _of_message(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("content"), list):
        return ""
    return "ok" if str(value.get("id")).startswith("msg_") else "odd"


def _of_events(events: list[dict[str, Any]]) -> str:
    """Return ok or odd where a stream holds a message from its start to its end; else nothing."""
    start = next((one for one in events if one.get("type") == "message_start"), {})
    ends = any(one.get("type") == "message_stop" for one in events)
    return _of_message(start.get("message")) if ends else ""


def _events(text: str) -> Iterator[dict[str, Any]]:
    """Yield the data of server-sent events, those alone that are objects."""
    for line in re.split(r"\r\n|\r|\n", text):
        if not line.startswith("data:"):
            continue
        try:
            value = json.loads(line.removeprefix("data:"))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
