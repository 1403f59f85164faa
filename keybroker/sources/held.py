"""The sessions that a worker was handed, until it hands them back; what its sources share.

And what opens the sign-ins that are kept on disk.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from keybroker.credential import Session
from keybroker.errors import CANNOT_KEEP, CacheLocked
from keybroker.signin import SignIn
from keybroker.values import replace

T = TypeVar("T")


class Memory:
    """
    What a machine was given when it signed in, where nothing seals it: see `login.tokens.Store`.

    What a person's sign-in gave is not kept so.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, Any] = {}

    def load(self, sign_in: SignIn) -> Any | None:
        """Return what is kept; CacheLocked where only a file could."""
        if not sign_in.unattended:
            problem = f"login {sign_in.name}: nothing opens the sign-ins here"
            raise CacheLocked(problem, hint=CANNOT_KEEP)
        tokens = self._tokens.get(sign_in.name)
        return tokens if tokens is not None and tokens.standing.mark == sign_in.mark else None

    def save(self, tokens: Any) -> None:
        self._tokens[tokens.standing.name] = tokens

    def forget(self, name: str) -> None:
        self._tokens.pop(name, None)

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Nobody else sees it."""
        del name
        return nullcontext()


class Held:
    """Sessions by what they open; the broker is who keeps them."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._changed: set[str] = set()
        self._shared: dict[str, Any] = {}
        self.store: Any = None  # a `login.tokens.Store`
        self.fresh = False  # a token that is still good is doubted

    def take(self, session: Session) -> None:
        """Go on with the broker's session, unless we know a newer one."""
        if session.serial > self.get(session.key).serial:
            self._sessions[session.key] = session
            self._changed.discard(session.key)

    def tell(self, session: Session) -> None:
        """Go on with a session that was sealed, and have the broker told of it."""
        self.take(session)
        self._changed.add(session.key)

    def get(self, key: str) -> Session:
        """Return what there is; an empty one, of serial 0, where nobody has logged in."""
        return self._sessions.get(key) or Session(key)

    def put(self, session: Session) -> Session:
        """Keep a session that was begun, renewed or ended here; return it with its serial."""
        counted = replace(session, serial=self.get(session.key).serial + 1)
        self._sessions[session.key] = counted
        self._changed.add(session.key)
        return counted

    @property
    def sign_ins(self) -> Any:
        """Where sign-ins are kept: on disk, or for as long as we live."""
        return self.store or self.shared("sign-ins", Memory)

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """Return what sources of one worker have together; it is made when it is first needed."""
        if name not in self._shared:
            self._shared[name] = make()
        found: T = self._shared[name]
        return found

    def changed(self) -> list[Session]:
        """Return those that changed here since the last time."""
        found = [self._sessions[key] for key in sorted(self._changed)]
        self._changed.clear()
        return found
