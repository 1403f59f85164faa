"""Where each surface's requests go, and with which key: a rule of what is set where.

    settings of the organisation  >  of the project, yours  >  the project's  >  yours  >  exports

Variable by variable the higher one counts, also where it is empty. Tried with the real client,
2.1.329 and 2.1.197, in all combinations of sources; see tests/test_doctor_requests.py.

See: https://code.claude.com/docs/en/llm-gateway-connect and /settings
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from keybroker.doctor.finding import ANTHROPIC

TOKEN = "ANTHROPIC_AUTH_TOKEN"  # noqa: S105
KEY = "ANTHROPIC_API_KEY"
LOGIN_TOKEN = "CLAUDE_CODE_OAUTH_TOKEN"  # noqa: S105
ADDRESS = "ANTHROPIC_BASE_URL"
HEADERS = "ANTHROPIC_CUSTOM_HEADERS"
FOUNDRY_KEY = "ANTHROPIC_FOUNDRY_API_KEY"
BEDROCK_TOKEN = "AWS_BEARER_TOKEN_BEDROCK"  # noqa: S105
# Set to a credential, or to something with one in it.
CREDENTIALS = (TOKEN, KEY, LOGIN_TOKEN, FOUNDRY_KEY, BEDROCK_TOKEN)
USE = "CLAUDE_CODE_USE_"
# By which variable each provider's format is switched on, in the order in which they are looked
# at; and which one then has the address.
MODES = {
    "BEDROCK": "ANTHROPIC_BEDROCK_BASE_URL",
    "FOUNDRY": "ANTHROPIC_FOUNDRY_BASE_URL",
    "ANTHROPIC_AWS": "ANTHROPIC_AWS_BASE_URL",
    "ANTHROPIC_GOOGLE_CLOUD": "ANTHROPIC_GOOGLE_CLOUD_BASE_URL",
    "MANTLE": "ANTHROPIC_BEDROCK_MANTLE_BASE_URL",
    "VERTEX": "ANTHROPIC_VERTEX_BASE_URL",
}
_OFF = ("", "0", "false", "no", "off")
SETTINGS = ("managed", "local", "project", "user")


@dataclass(frozen=True, slots=True)
class Held:
    """
    A credential that is set somewhere, never itself.

    Attributes:
        tail: The fingerprint of its last characters, by which Claude Code knows those that were
            declined.
    """

    fingerprint: str
    tail: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """
    One place in which something is set.

    Attributes:
        scope: managed, local, project or user for a file of Claude Code's; process for variables
            that a program is started with.
        place: What people know it by: a file, or `this terminal`.
        env: Variables and their values; of credentials `held` has a stand-in.
        held: Credentials; None: set, and empty.
        headers: The names in ANTHROPIC_CUSTOM_HEADERS, in small letters; None: it is not set.
        helper: The line of apiKeyHelper.
        others: Further keys of the file, those that matter.
        problem: Why nothing of it counts.
    """

    scope: str
    place: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    held: Mapping[str, Held | None] = field(default_factory=dict)
    headers: tuple[str, ...] | None = None
    helper: str | None = field(default=None, repr=False)
    others: Mapping[str, object] = field(default_factory=dict, repr=False)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """What goes into one header: which credential, and the layer that has it."""

    what: str  # apiKeyHelper, a variable, a header of one's own, a login, or nothing
    place: str = ""

    def __str__(self) -> str:
        return f"{self.what} in {self.place}" if self.place else self.what or "nothing"


NOTHING = Part("")
SAVED = Part("the saved login")


@dataclass(frozen=True, slots=True)
class Route:
    """
    Where a surface's requests go.

    Attributes:
        url: The address, as it is set; Anthropic's own where none is.
        url_from: What set it, perhaps to nothing; None: nobody.
        mode: The provider's format, such as BEDROCK; empty: Anthropic's.
        authorization: What goes into the header `authorization`.
        x_api_key: What goes into the header `x-api-key`.
        passed_over: What is set as well, and does not count, and why.
    """

    surface: str
    url: str
    url_from: Layer | None
    mode: str
    authorization: Part
    x_api_key: Part
    helper: Layer | None
    passed_over: tuple[str, ...] = ()

    @property
    def is_helped(self) -> bool:
        """Whether the helper's key is all that is sent."""
        sent = {one.what for one in (self.authorization, self.x_api_key) if one.what}
        return sent == {"apiKeyHelper"}


def route(surface: str, layers: Sequence[Layer], *, login: bool = False) -> Route:
    """
    Work out what counts.

    Args:
        surface: Whose requests they are.
        layers: All that is set, the higher before the lower.
        login: One at Anthropic is saved.
    """
    counting = [one for one in layers if not one.problem]
    mode = mode_of(counting)
    address = MODES.get(mode, ADDRESS)
    url_from = first(counting, address)
    url = "" if url_from is None else url_from.env[address].strip()
    authorization, x_api_key = _parts(counting, mode, login)
    return Route(
        surface,
        url or (ANTHROPIC if not mode else ""),
        url_from,
        mode,
        authorization,
        x_api_key,
        _helper(counting),
        tuple(_passed_over(counting, address, url_from)),
    )


def mode_of(layers: Iterable[Layer]) -> str:
    """Return the provider's format that is switched on; empty: none."""
    known = list(layers)
    for mode in MODES:
        layer = first(known, USE + mode)
        if layer is not None and layer.env[USE + mode].strip().lower() not in _OFF:
            return mode
    return ""


def first(layers: Iterable[Layer], name: str) -> Layer | None:
    """Return the layer whose value of a variable counts."""
    return next((one for one in layers if name in one.env), None)


def held(layers: Iterable[Layer], name: str) -> Layer | None:
    """Return the layer whose credential counts; None: none, or the one that counts is empty."""
    layer = next((one for one in layers if name in one.held), None)
    return layer if layer is not None and layer.held[name] is not None else None


def _helper(layers: Iterable[Layer]) -> Layer | None:
    return next((one for one in layers if one.helper), None)


def _parts(layers: Sequence[Layer], mode: str, login: bool) -> tuple[Part, Part]:
    """Return what goes into `authorization` and `x-api-key`."""
    token, key = (held(layers, name) for name in (TOKEN, KEY))
    helper = _helper(layers)
    by_token = Part(TOKEN, token.place) if token else NOTHING
    by_key = Part(KEY, key.place) if key else NOTHING
    by_helper = Part("apiKeyHelper", helper.place) if helper else NOTHING
    bearer = by_token if token else by_helper
    if mode:
        return _in_format(layers, mode, bearer, by_key)
    custom = next((one for one in layers if one.headers is not None), None)
    own = custom.headers if custom is not None and custom.headers else ()
    own_place = custom.place if custom is not None else ""
    x_api_key = by_key if key else by_helper
    if "x-api-key" in own:
        x_api_key = Part(f"x-api-key of {HEADERS}", own_place)
    if bearer is NOTHING and "authorization" in own:
        bearer = Part(f"authorization of {HEADERS}", own_place)
    elif bearer is NOTHING and x_api_key is NOTHING:
        if by_login := held(layers, LOGIN_TOKEN):
            bearer = Part(LOGIN_TOKEN, by_login.place)
        elif login:
            bearer = SAVED
    return bearer, x_api_key


def _in_format(layers: Sequence[Layer], mode: str, bearer: Part, key: Part) -> tuple[Part, Part]:
    """Return the same for a provider's format."""
    if mode == "BEDROCK" and (own := held(layers, BEDROCK_TOKEN)):
        return Part(BEDROCK_TOKEN, own.place), key
    if mode == "FOUNDRY" and (own := held(layers, FOUNDRY_KEY)):
        return NOTHING, Part(FOUNDRY_KEY, own.place)
    if mode == "ANTHROPIC_AWS":
        return bearer, bearer
    return bearer, key if mode in ("BEDROCK", "VERTEX") else NOTHING


def _passed_over(layers: Sequence[Layer], address: str, used: Layer | None) -> Iterable[str]:
    """Say which other addresses are set, and why they do not count."""
    if used is None or not used.env[address].strip():
        return
    for one in layers:
        value = one.env.get(address, "").strip()
        if one is used or not value or value.rstrip("/") == used.env[address].strip().rstrip("/"):
            continue
        if used.scope == "managed":
            why = "what the organisation has set beats all others"
        elif one.scope == "process":
            why = "settings beat an export"
        else:
            why = f"what is set in {used.place} beats it"
        yield f"{address} in {one.place} does not count: {why}"
