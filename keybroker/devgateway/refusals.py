"""
Every way in which LiteLLM 1.106.2 says no, word for word, odd ones included.

An adapter has to tell them apart: `code` is text, `param` is sometimes the text "None", some
messages are a Python dict printed as text, and a 500 can be final.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
Problem = tuple[str, list[str | int], str]  # FastAPI's type, place and message

LICENCE = (
    "You must be a LiteLLM Enterprise user to use this feature. If you have a license please set "
    "`LITELLM_LICENSE` in your env."
)


class RefusalError(Exception):
    """An answer other than 200: status, JSON body and headers."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"refused with {status}")  # never the body, which may name a key
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


def refusal(status: int, kind: str, message: str, param: str | None = None) -> RefusalError:
    """Say no in LiteLLM's envelope."""
    error = {"message": message, "type": kind, "param": param, "code": str(status)}
    return RefusalError(status, {"error": error})


def unauthorized(message: str) -> RefusalError:
    """Say 401 for what has no type of its own."""
    return refusal(401, "auth_error", message, "None")


def internal(status: int, said: str, param: str | None = None) -> RefusalError:
    """Say what was raised as a dict and printed as text."""
    return refusal(status, "internal_server_error", str({"error": said}), param)


def bad_request(message: str, param: str) -> RefusalError:
    """Say 400 about one field."""
    return refusal(400, "bad_request_error", message, param)


def not_found(message: str) -> RefusalError:
    """Say that there is no such key."""
    return refusal(404, "not_found_error", message, "key")


def invalid(*problems: Problem) -> RefusalError:
    """Say 422 in FastAPI's shape."""
    detail = [{"type": kind, "loc": loc, "msg": message} for kind, loc, message in problems]
    return RefusalError(422, {"detail": detail})


def anthropic(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> RefusalError:
    """Say what is found wrong behind the authentication, which is in Anthropic's shape."""
    error = {"type": kind, "message": message}
    return RefusalError(status, {"type": "error", "error": error}, headers)


def not_ours(masked: str) -> RefusalError:
    """Say that this is not a LiteLLM key at all."""
    expected = "expected to start with 'sk-'."
    return unauthorized(f"LiteLLM Virtual Key expected. Received={masked}, {expected}")


def unknown_key(name: str, token: str) -> RefusalError:
    """Say that no such key is known; the hash is in the message."""
    return refusal(
        401,
        "token_not_found_in_db",
        "Authentication Error, Invalid proxy server token passed. "
        f"Received API Key = {name}, Key Hash (Token) ={token}. "
        "Unable to find token in cache or `LiteLLM_VerificationTokenTable`",
        "key",
    )


def blocked() -> RefusalError:
    """Say that somebody blocked the key."""
    said = "Key is blocked. Update via `/key/unblock` if you're an admin."
    return unauthorized(f"Authentication Error, {said}")


def expired(status: int, name: str, ended: str, now: str) -> RefusalError:
    """Say that time ended the key."""
    return refusal(
        status,
        "expired_key",
        f"Authentication Error - Expired Key. Key Expiry time {ended} and current time {now}",
        name,
    )


def model_denied(model: str) -> RefusalError:
    """Say that the key may not call this model."""
    return refusal(
        403,
        "key_model_access_denied",
        f"The requested model '{model}' is not available for this API key, or the model name is "
        "invalid. Check the models available to you and try again.",
        "model",
    )


def over_budget(status: int, label: str, spend: float, budget: float) -> RefusalError:
    """Say that the money is gone."""
    said = f"Key={label} Current cost: {spend}, Max budget: {budget}"
    return refusal(status, "budget_exceeded", f"Budget has been exceeded! {said}")


def wrong_route(routes: Sequence[str], path: str) -> RefusalError:
    """Say that a key of this type may not call this route."""
    said = f"Only allowed to call routes: {routes}. Tried to call route: {path}"
    detail = f"Virtual key is not allowed to call this route. {said}"
    return RefusalError(403, {"detail": detail})


def not_admin(path: str) -> RefusalError:
    """Say, with a 401, that the key is good and the right is missing."""
    return unauthorized(
        "Authentication Error, Only proxy admin can be used to generate, delete, update info for "
        f"new keys/users/teams. Route={path}. Your role=unknown. Your user_id=*******"
    )


def too_fast(token: str, limit: int, ends: str, wait: int) -> RefusalError:
    """Say that the key has used up its minute."""
    said = f"Current limit: {limit}, Remaining: 0. Limit resets at: {ends} UTC"
    message = f"Rate limit exceeded for api_key: {token}. Limit type: requests. {said}"
    return anthropic(429, "rate_limit_error", message, {"retry-after": str(wait)})


def checked(body: Mapping[str, Any], fields: Mapping[str, str], place: str = "body") -> Json:
    """Take the known fields out of a request; a wrong one is answered with 422."""
    given = {name: body[name] for name in fields if body.get(name) is not None}
    problems = [_problem(place, name, fields[name], value) for name, value in given.items()]
    if found := [problem for problem in problems if problem is not None]:
        raise invalid(*found)
    return {name: _CONVERT.get(fields[name], _same)(value) for name, value in given.items()}


def _same(value: Any) -> Any:
    return value


_CONVERT: dict[str, Callable[[Any], Any]] = {"float": float, "int": int}
_TYPES: dict[str, tuple[type, str]] = {
    "string": (str, "string"),
    "list": (list, "list"),
    "dict": (dict, "dictionary"),
}
_NOUNS = {"float": ("a number", "a valid number"), "int": ("an integer", "a valid integer")}


def _problem(place: str, name: str, kind: str, value: object) -> Problem | None:
    loc: list[str | int] = [place, name]
    if kind == "key_type":
        if value in ("llm_api", "management", "read_only", "default"):
            return None
        names = "'llm_api', 'management', 'read_only' or 'default'"
        return ("enum", loc, f"Input should be {names}")
    if kind in _TYPES:
        expected, noun = _TYPES[kind]
        if isinstance(value, expected):
            return None
        return (f"{kind}_type", loc, f"Input should be a valid {noun}")
    parsed, valid = _NOUNS[kind]
    if isinstance(value, str):
        try:
            _CONVERT[kind](value)
        except ValueError:
            said = f"Input should be {valid}, unable to parse string as {parsed}"
            return (f"{kind}_parsing", loc, said)
    elif not isinstance(value, int | float):
        return (f"{kind}_type", loc, f"Input should be {valid}")
    elif kind == "int" and value != value // 1:
        return (
            "int_from_float",
            loc,
            f"Input should be {valid}, got a number with a fractional part",
        )
    return None


def flag(query: Mapping[str, str], name: str) -> bool:
    """Read a yes or no from a query as FastAPI does."""
    text = query.get(name, "false").lower()
    if text in ("true", "1", "yes", "on", "t", "y"):
        return True
    if text in ("false", "0", "no", "off", "f", "n"):
        return False
    said = "Input should be a valid boolean, unable to interpret input"
    raise invalid(("bool_parsing", ["query", name], said))


def paging(query: Mapping[str, str], size: int) -> tuple[int, int]:
    """Read the page asked for and its size, of which 100 is the most."""
    asked = checked(query, {"page": "int", "size": "int"}, "query")
    page, size = asked.get("page", 1), asked.get("size", size)
    low = "Input should be greater than or equal to 1"
    problems: list[Problem] = [
        ("greater_than_equal", ["query", name], low)
        for name, value in (("page", page), ("size", size))
        if value < 1
    ]
    if size > 100:
        high = "Input should be less than or equal to 100"
        problems.append(("less_than_equal", ["query", "size"], high))
    if problems:
        raise invalid(*problems)
    return page, size
