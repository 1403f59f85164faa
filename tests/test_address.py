"""What people paste as an address, and what it may mean."""

from __future__ import annotations

import pytest

from keybroker.address import Address, read_pasted
from keybroker.errors import ConfigError

OPTSCALE = "https://my.optscale.ai/llm_proxy/00000000-0000-0000-0000-000000000000"
MEANINGS = {
    "https://llm.example.com": ["", "/anthropic"],
    "https://llm.example.com/": ["", "/anthropic"],
    "https://llm.example.com//": ["", "/anthropic"],
    "  https://llm.example.com\n": ["", "/anthropic"],
    '"https://llm.example.com",': ["", "/anthropic"],
    "<https://llm.example.com>": ["", "/anthropic"],
    "HTTPS://llm.example.com": ["", "/anthropic"],
    "https://llm.example.com/v1": ["", "/anthropic"],
    "https://llm.example.com/v1/": ["", "/anthropic"],
    "https://llm.example.com/v1/messages": ["", "/anthropic"],
    "https://llm.example.com/v1/messages/count_tokens": ["", "/anthropic"],
    "https://llm.example.com/v1/chat/completions": ["", "/anthropic"],
    "https://llm.example.com/chat/completions": ["", "/anthropic"],
    "https://llm.example.com/anthropic": ["/anthropic", ""],
    "https://llm.example.com/anthropic/v1": ["/anthropic", ""],
    "https://llm.example.com/anthropic/v1/messages": ["/anthropic", ""],
    "https://llm.example.com/bedrock": ["", "/bedrock", "/anthropic"],
    "https://llm.example.com/vertex_ai": ["", "/vertex_ai", "/anthropic"],
    "https://llm.example.com/ui/": ["", "/ui", "/anthropic"],
}


@pytest.mark.parametrize("pasted", MEANINGS)
def test_what_may_be_meant_is_asked_in_order(pasted: str) -> None:
    """The ends that belong to one API come off; what is common to all of them is the root."""
    host = "https://llm.example.com"
    found = read_pasted(pasted)
    assert list(found.candidates) == [host + end for end in MEANINGS[pasted]]
    assert (found.root, found.openai) == (host, f"{host}/v1")


def test_a_path_before_the_end_is_kept() -> None:
    """A gateway may stand below a path of its host."""
    assert read_pasted("https://example.com/llm/v1").candidates == (
        "https://example.com/llm",
        "https://example.com/llm/anthropic",
    )


@pytest.mark.parametrize("end", ["/v1", "/anthropic", "", "/v1/chat/completions"])
def test_optscale_is_known_by_its_path(end: str) -> None:
    """Its page for Claude Code says: copy the address and replace /v1 by /anthropic."""
    assert read_pasted(OPTSCALE + end) == Address(
        OPTSCALE + end, (f"{OPTSCALE}/anthropic", OPTSCALE), OPTSCALE, f"{OPTSCALE}/v1"
    )


@pytest.mark.parametrize("end", ["", "/api/v1", "/api", "/docs/quickstart"])
def test_openrouter_has_one_address(end: str) -> None:
    """Its API is below /api, whatever page of it was pasted."""
    found = read_pasted(f"https://openrouter.ai{end}")
    assert found.candidates == ("https://openrouter.ai/api",)
    assert found.openai == "https://openrouter.ai/api/v1"


def test_an_exact_address_stays_as_it_is() -> None:
    """`--exact` takes nothing off."""
    url = "https://llm.example.com/anthropic/v1"
    assert read_pasted(url, exact=True).candidates == (url,)


REFUSED = {
    "localhost:8766": ("localhost:8766 has no http:// before it", "http://localhost:8766"),
    "127.0.0.1:4000/v1": ("127.0.0.1:4000 has no http:// before it", "http://127.0.0.1:4000/v1"),
    "localhost": ("localhost has no http:// before it", "http://localhost"),
    "llm.example.com": ("llm.example.com has no https:// before it", "https://llm.example.com"),
    "llm.example.com/v1": ("no https:// before it", "https://llm.example.com/v1"),
    "http://llm.example.com": ("would send keys in clear", "or add --allow-http"),
    "http://10.0.0.7:4000/v1": (
        "http://10.0.0.7:4000 would send keys in clear",
        "https://10.0.0.7:4000/v1, or add --allow-http",
    ),
    "http://0.0.0.0:4000": ("0.0.0.0 is where a server listens", "http://localhost:4000"),
    "http://[::]:4000": (":: is where a server listens", "http://localhost:4000"),
    "ftp://llm.example.com": ("must begin with https:// or http://", "https://llm.example.com"),
    "https://": ("expected an address", "https://llm.example.com"),
    "https:///v1": ("expected an address", "https://llm.example.com"),
    "https://llm.example.com:99999": ("expected an address", "https://llm.example.com"),
    "https://llm example.com": ("expected an address", "https://llm.example.com"),
    "https://jo:geheim@llm.example.com": ("user name or a password", "https://llm.example.com"),
    "https://llm.example.com/?key=geheim": ("must not hold ?", "https://llm.example.com"),
    "": ("it is empty", "https://llm.example.com"),
    "''": ("it is empty", "https://llm.example.com"),
    "sk-geheim": ("looks like a key", "the key is asked for later"),
    "Bearer geheim": ("looks like a key", "the key is asked for later"),
    "eyJnZWhlaW0.eyJnZWhlaW0.geheim": ("begins with https:// or http://", "llm.example.com"),
    "geheim": ("begins with https:// or http://", "llm.example.com"),
    "llm.example.com/sk-geheim": ("begins with https:// or http://", "llm.example.com"),
    "llm.example.com/?key=geheim": ("no https:// before it", "https://llm.example.com"),
}


@pytest.mark.parametrize("pasted", REFUSED)
def test_what_is_no_address_is_explained(pasted: str) -> None:
    """The message says what is wrong, the hint what to type; a secret is in neither."""
    with pytest.raises(ConfigError) as caught:
        read_pasted(pasted)
    says, hint = REFUSED[pasted]
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "geheim" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("host", ["localhost:4000", "127.0.0.1:4000", "127.8.0.1", "[::1]:80"])
def test_plain_http_is_fine_on_this_machine(host: str) -> None:
    """Nobody is on the way."""
    assert read_pasted(f"http://{host}").root == f"http://{host}"


def test_plain_http_elsewhere_needs_a_word() -> None:
    """`--allow-http`."""
    assert read_pasted("http://10.0.0.7:4000", allow_http=True).root == "http://10.0.0.7:4000"


def test_what_the_hint_says_to_type_works() -> None:
    """Each address that is offered is taken."""
    for pasted, (_, hint) in REFUSED.items():
        address = next(word for word in hint.split() if "://" in word) if "://" in hint else ""
        if address:
            assert read_pasted(address.rstrip(",")).candidates, pasted
