"""The sessions that a worker was handed, until it hands them back."""

from keybroker.credential import Session
from keybroker.values import replace


class Held:
    """Sessions by what they open; the broker is who keeps them."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._changed: set[str] = set()

    def take(self, session: Session) -> None:
        """Go on with the broker's session, unless we know a newer one."""
        if session.serial > self.get(session.key).serial:
            self._sessions[session.key] = session
            self._changed.discard(session.key)

    def get(self, key: str) -> Session:
        """Return what there is; an empty one, of serial 0, where nobody has logged in."""
        return self._sessions.get(key) or Session(key)

    def put(self, session: Session) -> Session:
        """Keep a session that was begun, renewed or ended here; return it with its serial."""
        counted = replace(session, serial=self.get(session.key).serial + 1)
        self._sessions[session.key] = counted
        self._changed.add(session.key)
        return counted

    def changed(self) -> list[Session]:
        """Return those that changed here since the last time."""
        found = [self._sessions[key] for key in sorted(self._changed)]
        self._changed.clear()
        return found
