"""What a person pasted as the address of a gateway: read, explained, and what it may mean.

    https://llm.example.com/v1  ->  for Claude Code: https://llm.example.com, or …/anthropic
                                    for OpenAI's clients: https://llm.example.com/v1

Which of the candidates answers is found by asking: `sources.recognise`.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from keybroker.config import is_loopback
from keybroker.errors import ConfigError
from keybroker.fields import looks_like_key, read_url

OPTSCALE = re.compile(r"/llm_proxy/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.I)
ANTHROPIC = "/anthropic"
# What documents and browsers have behind a gateway's own address; the longer ones first.
_OPENAI = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
    *("/chat/completions", "/v1"),
)
_MESSAGES = ("/v1/messages/count_tokens", "/v1/messages")
_OF_EITHER = ("/v1/models",)
# Where LiteLLM hands requests on as they are, and where its web page is.
_BESIDE = ("/bedrock", "/vertex_ai", "/vertex-ai", "/openai", "/ui")
_SPLIT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.S)
_HOST = re.compile(r"(?:[a-z0-9-]{1,63}\.)*[a-z0-9-]{1,63}(?::[0-9]{1,5})?")
_QUOTES = {'"': '"', "'": "'", "`": "`", "<": ">", "“": "”", "‘": "’"}  # noqa: RUF001
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # what servers print that listen on every address


@dataclass(frozen=True, slots=True)
class Address:
    """
    What one address may mean.

    Attributes:
        given: As it was pasted, without what is only decoration.
        candidates: Addresses for Claude Code, in the order to ask.
        root: What is left without the ends that belong to one API or another.
        openai: What an OpenAI client would be given, should the gateway serve it.
    """

    given: str
    candidates: tuple[str, ...]
    root: str
    openai: str


def read_pasted(
    text: str, *, allow_http: bool = False, exact: bool = False, flag: str = "--base-url"
) -> Address:
    """
    Read an address that a person typed or pasted.

    Args:
        allow_http: http:// is meant, though others on the way can read it.
        exact: The address is meant as it is; nothing is taken off it.
        flag: What the hint says to type.

    Raises:
        ConfigError: It is no address, or one that would send keys in clear. What was pasted is
            repeated only if it is certainly no key.
    """
    given = _undecorated(text)
    if not given:
        raise ConfigError("address: it is empty", hint=f"{flag} https://llm.example.com")
    if looks_like_key(given):
        raise ConfigError(
            "address: this looks like a key, not like an address",
            hint=f"{flag} https://llm.example.com; the key is asked for later",
        )
    found = _SPLIT.fullmatch(given)
    if found is None:
        raise _without_scheme(given, flag)
    given = f"{found[1].lower()}://{found[2]}"
    try:
        url = read_url(given)
    except ValueError as error:
        raise ConfigError(f"address: {error}", hint=f"{flag} https://llm.example.com") from None
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _EVERYWHERE:
        port = "" if parts.port is None else f":{parts.port}"
        raise ConfigError(
            f"address: {host} is where a server listens, not where it is asked",
            hint=f"{flag} {parts.scheme}://localhost{port}",
        )
    if parts.scheme == "http" and not is_loopback(url) and not allow_http:
        raise ConfigError(
            f"address: http://{parts.netloc} would send keys in clear",
            hint=f"{flag} https://{parts.netloc}{parts.path}, or add --allow-http",
        )
    if exact:
        return Address(url, (url,), url, f"{url}/v1")
    return _meanings(url)


def _undecorated(text: str) -> str:
    """Take off what came along with it: spaces, quotes, a comma."""
    found, before = text, ""
    while found != before:
        before, found = found, found.strip().rstrip(",;")
        if len(found) > 1 and _QUOTES.get(found[0]) == found[-1]:
            found = found[1:-1]
    return found


def _without_scheme(given: str, flag: str) -> ConfigError:
    host, slash, path = given.partition("/")
    problem = "address: expected one that begins with https:// or http://"
    dotted = "." in host or ":" in host or host == "localhost"
    if not dotted or not _HOST.fullmatch(host) or looks_like_key(path):
        return ConfigError(problem, hint=f"{flag} https://llm.example.com")
    scheme = "http" if is_loopback(f"http://{host}") else "https"
    if re.fullmatch(r"[!-~]{0,80}", path) is None or "@" in path or "?" in path:
        slash = path = ""
    return ConfigError(
        f"address: {host} has no {scheme}:// before it",
        hint=f"{flag} {scheme}://{host}{slash}{path}",
    )


def _meanings(url: str) -> Address:
    parts = urlsplit(url)
    origin, path = f"{parts.scheme}://{parts.netloc}", parts.path
    path, _ = _without(path, (*_MESSAGES, *_OPENAI, *_OF_EITHER))
    path, anthropic = _without(path, (ANTHROPIC,))
    beside = False
    if not anthropic:
        path, beside = _without(path, _BESIDE)
    root = origin + path
    order = [root + ANTHROPIC, root] if anthropic or OPTSCALE.search(path) else [root]
    if beside:
        order.append(url)
    if root + ANTHROPIC not in order:
        order.append(root + ANTHROPIC)
    if (parts.hostname or "") == "openrouter.ai":
        root = f"{origin}/api"  # its API, whatever page of it was pasted
        order = [root]
    return Address(url, tuple(order), root, f"{root}/v1")


def _without(path: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    for end in ends:
        if path.lower().endswith(end):
            return path[: -len(end)].rstrip("/"), True
    return path, False
