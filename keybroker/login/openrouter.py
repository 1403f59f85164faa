"""OpenRouter: a person lets it make a key, which has no end.

Its flow is OAuth's in thought, not in names, and has no state: ours is in the path that the
browser comes back to.

See: https://openrouter.ai/docs/guides/overview/auth/oauth
"""

from collections.abc import Mapping
from urllib.parse import urlencode

from keybroker.errors import SourceDenied
from keybroker.login.oauth import challenge, code_of
from keybroker.login.provider import BROWSER, Base, Visit, plain, said, unguessable
from keybroker.login.tokens import Tokens

KEYS = "/api/v1/auth/keys"


class OpenRouter(Base):
    """OpenRouter, or what answers as it does."""

    flows = (BROWSER,)

    @property
    def redirect(self) -> tuple[str, int, str]:
        _, port, path = super().redirect
        return "localhost", port, path

    def browser(self, redirect: str) -> Visit:
        """Begin a sign-in that comes back here; see `Provider`."""
        state, verifier, url = unguessable(), unguessable(), self._settings["url"]
        asked = {
            "callback_url": f"{redirect}/{state}",
            "code_challenge": challenge(verifier),
            "code_challenge_method": "S256",
            "key_label": f"keybroker {self._sign_in.name}",
        }

        def redeem(answer: Mapping[str, str]) -> Tokens:
            http = self._http(url, "url")
            given = {
                "code": code_of(answer, self._who, http.host),
                "code_verifier": verifier,
                "code_challenge_method": "S256",
            }
            reply = http.call("POST", KEYS, body=given)
            if reply.status in (400, 403):
                raise SourceDenied(
                    f"{self._who}: {http.host} does not take the code ({reply.status})",
                    hint=f"begin anew: keybroker login {self._sign_in.name}",
                )
            if reply.status != 200:
                raise self._trouble(reply, http.host, "make a key")
            found = plain(reply.value)
            key = self._secret(found.get("key"), "key")
            return self._made(key, reply.asked_at, None, who=said(found.get("user_id")))

        return Visit(f"{url}/auth?{urlencode(asked)}", state, redeem)

    def refresh(self, tokens: Tokens) -> Tokens:
        """Say that only a person can have another key; see `Provider`."""
        raise self._needed("a key is not renewed")

    def revoke(self, tokens: Tokens) -> bool:
        return False  # a key cannot delete itself
