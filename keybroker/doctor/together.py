"""Checks side by side, with one deadline for all of them: one that hangs is a finding."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from keybroker.doctor.finding import Finding
from keybroker.errors import place

Check = Callable[[], Iterable[Finding]]


def together(checks: Mapping[str, Check], seconds: float) -> list[Finding]:
    """
    Run all checks at once; return what they found, in their order.

    Args:
        checks: Each with the name that people know it by.
        seconds: When those that did not end are left alone.
    """
    ends = time.monotonic() + seconds
    came: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()

    def run(name: str, check: Check) -> None:
        try:
            came.put((name, list(check())))
        except Exception as error:  # its text may hold a secret; its type and place do not
            what = f"{name}: {type(error).__name__} at {place(error)}"
            came.put((name, [Finding("not-looked-at", what, "please report this line")]))

    for name, check in checks.items():
        threading.Thread(target=run, args=(name, check), daemon=True).start()
    found: dict[str, list[Finding]] = {}
    while len(found) < len(checks) and (left := ends - time.monotonic()) > 0:
        try:
            name, findings = came.get(timeout=left)
        except queue.Empty:
            break
        found[name] = findings
    for name in checks:
        if name not in found:
            what = f"{name}: did not end within {seconds:g} s"
            found[name] = [Finding("not-looked-at", what, "keybroker doctor, again")]
    return [one for name in checks for one in found[name]]
