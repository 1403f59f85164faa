"""Where the browser comes back to: an address of this machine, for one answer, for a while.

See: RFC 8252, section 7.3. Whoever else asks is told nothing; who has not the state is a stranger.
"""

import hmac
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keybroker.errors import KeybrokerError, NobodyAnswers, place
from keybroker.login import page
from keybroker.login.tokens import Tokens
from keybroker.values import dataclass, field

SHOWN_SECONDS = 5.0  # until the page was fetched, or nobody will
REQUEST_SECONDS = 5.0  # for one request to be sent
STRANGER = "This is not the sign-in that is waiting here. It may be an older one."


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Ask no name server what we are called, as its base does."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing: who goes away is no trouble of ours."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request is answered; `sent` is called when it is."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "text/plain"})
    sent: Callable[[], None] = lambda: None


class Loopback:
    """
    Listens from the beginning until it is closed.

    Args:
        login: Its name, for the page.
        host: 127.0.0.1, or localhost where a provider wants it so.
        port: 0: any free one.
        path: The only one that is answered.

    Raises:
        NobodyAnswers: The port is taken.
    """

    def __init__(self, login: str, host: str, port: int, path: str) -> None:
        self._login = login
        self._path = path or "/"
        # so that no address with a code in it stays in the browser
        self._over = f"{path.rstrip('/')}/signed-in"
        self._state = ""
        self._redeem: Callable[[Mapping[str, str]], Tokens] | None = None
        self._lock = threading.Lock()
        self._found: Tokens | KeybrokerError | None = None
        self._pasted = False  # no browser comes for the page
        self._done = threading.Event()
        self._shown = threading.Event()
        loopback = self

        class Handler(_Handler):
            owner = loopback

        try:
            self._server = _Server(("127.0.0.1", port), Handler)
        except OSError as error:
            raise NobodyAnswers(
                f"login {login}: cannot listen on 127.0.0.1:{port} ({error.strerror})",
                hint="end what uses the port, or set another one in the login's table",
            ) from None
        self.port = self._server.server_address[1]
        self.address = f"http://{host}:{self.port}{path}"
        self._hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")}
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def expect(self, state: str, redeem: Callable[[Mapping[str, str]], Tokens]) -> None:
        """Take the answer that has this state."""
        self._state, self._redeem = state, redeem

    def wait(self, seconds: float) -> Tokens | None:
        """
        Return what the sign-in gave, once its page was seen; None when there is nothing yet.

        Raises:
            KeybrokerError: It failed.
        """
        if not self._done.wait(seconds):
            return None
        if not self._pasted:
            self._shown.wait(SHOWN_SECONDS)
        if isinstance(self._found, KeybrokerError):
            raise self._found
        return self._found

    def take(self, answer: Mapping[str, str], *, pasted: bool = False) -> bool:
        """Take an answer if it is the one that is waited for; say whether it was."""
        if self._redeem is None or not hmac.compare_digest(
            answer.get("state", "").encode(), self._state.encode()
        ):
            return False
        with self._lock:
            if self._found is None:
                self._pasted = pasted
                try:
                    self._found = self._redeem(answer)
                except KeybrokerError as error:
                    self._found = error
                except Exception as error:  # its text may hold a secret; its place does not
                    self._found = KeybrokerError(
                        f"login {self._login}: {type(error).__name__} at {place(error)}"
                    )
                self._done.set()
        return True

    def answer(self, host: str | None, address: str) -> "Answer":
        """Return what whoever asks is told; a favicon, or a stranger, nothing."""
        path = urlsplit(address).path
        if host not in self._hosts:
            return Answer(404, "Not found")
        if self._is_for(path):
            if self.take(read_answer(address)):
                return Answer(303, "", {"location": self._over})
            return Answer(400, page.failure(self._login, STRANGER), page.HEADERS)
        if path == self._over and self._done.is_set():
            return Answer(*self._page(), page.HEADERS, self._shown.set)
        return Answer(404, "Not found")

    def _is_for(self, path: str) -> bool:
        """Say whether a path is the one that is answered, or that with the state after it."""
        with_state = f"{self._path.rstrip('/')}/{self._state}"
        known = bool(self._state) and hmac.compare_digest(path.encode(), with_state.encode())
        return (path or "/") == self._path or known

    def _page(self) -> tuple[int, str]:
        """Return the page about how it ended."""
        if isinstance(self._found, KeybrokerError):
            return 400, page.failure(self._login, _sentence(self._found.message))
        who = self._found.standing.who if self._found is not None else ""
        return 200, page.success(self._login, who)


class _Handler(BaseHTTPRequestHandler):
    """One request. `BaseHTTPRequestHandler` has these names."""

    owner: Loopback
    timeout = REQUEST_SECONDS
    server_version, sys_version = "keybroker", ""
    protocol_version = "HTTP/1.0"  # a connection ends with its answer

    def do_GET(self) -> None:
        """Send what there is to be said."""
        found = self.owner.answer(self.headers.get("host"), self.path)
        data = found.text.encode()
        self.send_response(found.status)
        for name, value in found.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        found.sent()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing: an address has the code in it."""


def _sentence(message: str) -> str:
    """Return an error's message as a sentence of a page."""
    text = message.partition(": ")[2] or message
    return f"{text[:1].upper()}{text[1:]}."


def read_answer(text: str) -> dict[str, str]:
    """
    Read the address that a browser came back to, or what is after its ?.

    The state of a provider that repeats none is the last part of the path.
    """
    target = urlsplit(text.strip())
    query = parse_qs(target.query or (text.strip() if "=" in text else ""), keep_blank_values=True)
    found = {name: values[0] for name, values in query.items() if len(values) == 1}
    if "state" not in query and target.query:
        found["state"] = target.path.rpartition("/")[2]
    return found
