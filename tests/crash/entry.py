"""
Start keybroker's command, daemon or worker with a death, or a mutation, planned.

    python entry.py command PLAN get work
    python entry.py daemon PLAN STATE SOCKET text
    python entry.py worker PLAN PARENT STATE

PLAN is JSON: {"effect": "issue", "when": "before", "who": "worker", "mutant": null}. A daemon's
workers die by a file instead, {"armed": "/path"}, which has one such object a line: the first is
armed, and taken out as it is used. The package itself has no hook for this: what is replaced here
is `worker.perform`, through which every effect passes, and single functions for the mutants.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from keybroker.values import replace

ENTRY = os.path.abspath(__file__)
DIED: Path | None = None  # where those who die say so


def die(who: str) -> None:
    """End the worker that runs this, its parent (a command or the daemon), or both, by kill -9."""
    global DIED
    parent = int(sys.argv[1])
    if DIED is not None:
        with open(DIED, "a") as file:
            file.write(f"{who}\n")
        DIED = None
    if who != "worker" and os.getppid() == parent:  # never a later parent
        os.kill(parent, signal.SIGKILL)
    if who in ("worker", "both"):
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Live on without a parent, as where there is no parent-death signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 0)


def armed(file: Path, effect: str) -> dict[str, Any] | None:
    """Return the plan for this effect, which is used with that; None when it is not its turn."""
    try:
        first, _, rest = file.read_text().partition("\n")
    except FileNotFoundError:
        return None
    if not first:
        return None
    plan: dict[str, Any] = json.loads(first)
    if plan["who"] == "daemon":
        outlive_parent()
    if plan["effect"] != effect:
        return None
    global DIED
    DIED = file.with_name("died")
    draft = file.with_name(f"plan.{os.getpid()}")
    draft.write_text(rest)
    draft.replace(file)
    return plan


def plan_death(plan: dict[str, Any]) -> None:
    """Replace what does effects by what dies at one of them."""
    from keybroker import paths, worker

    perform = worker.perform

    def killing(name: str, call: Callable[[], Any]) -> Any:
        now: dict[str, Any] | None = plan
        if "armed" in plan:
            now = armed(Path(plan["armed"]), name)
        if now is None or name != now["effect"]:
            return perform(name, call)
        when, who = now["when"], now["who"]
        if when == "before":
            die(who)
        if when == "during":
            half_done(who)
        result = perform(name, call)
        if when == "after":
            die(who)
        return result

    def half_done(who: str) -> None:
        """Die in the middle: half a line, a draft that was not put in place, half an answer."""

        def half_append(disk: paths.Disk, path: Any, data: bytes) -> None:
            with open(path, "ab") as file:
                file.write(data[: len(data) // 2])
            die(who)
            with open(path, "ab") as file:  # the command died; this worker goes on
                file.write(data[len(data) // 2 :])

        def half_replace(disk: paths.Disk, path: Any, data: bytes) -> None:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(data[: len(data) // 2])
            die(who)
            path.write_bytes(data)

        def half_send(data: bytes) -> None:
            os.write(1, data[: len(data) // 2])
            die(who)
            os.write(1, data[len(data) // 2 :])

        paths.Disk.append = half_append  # type: ignore[method-assign]
        paths.Disk.replace = half_replace  # type: ignore[method-assign]
        worker._send = half_send

    worker.perform = killing  # type: ignore[assignment]


def mutate(name: str) -> None:
    """Break one promise's mechanism."""
    from keybroker import broker, paths, rotation, sources, worker

    if name == "label after the call":
        write = worker.Operations._write
        late: list[Any] = []

        def write_late(self: Any, effect: str, record: Any) -> None:
            if effect == "wanted":
                late.append(record)
                return
            for wanted in late:
                write(self, "wanted", wanted)
            late.clear()
            write(self, effect, record)

        worker.Operations._write = write_late  # type: ignore[method-assign]
    elif name == "no lock":
        paths.take_owner_lock = lambda state: os.open(os.devnull, os.O_RDONLY)
    elif name == "no drain":
        publish = worker.Operations.publish

        def publish_and_drop(self: Any, *args: Any, **values: Any) -> Any:
            values["hold"] = timedelta(0)
            return publish(self, *args, **values)

        worker.Operations.publish = publish_and_drop  # type: ignore[method-assign]
    elif name == "no look-up":
        candidates = rotation._candidates

        def without_look_ups(slots: Any, *rest: Any) -> Any:
            return candidates(replace(slots, open=()), *rest)

        rotation._candidates = without_look_ups
    elif name == "404 from any issuer":

        def by_configuration(self: Any, issuer: Any, timeout: Any) -> Any:
            environment = {**self.environment, "HOME": os.environ["HOME"]}
            from keybroker.config import load

            config = load(paths.config_files(environment))
            return sources.build(next(iter(config.profiles.values())), environment)

        worker.Operations._revoker = by_configuration  # type: ignore[method-assign]
    elif name == "verify skipped":
        worker.Operations.verify = lambda self, profile, secret: {  # type: ignore[method-assign]
            "look": "alive",
            "method": "models",
            "reason": "200",
        }
    elif name == "adopt without check":

        def adopt(self: Any, at_work: Any, sealed: Any) -> None:
            if sealed is None:
                return
            from keybroker.slots import Key

            key = Key(
                sealed.label,
                sealed.issuer,
                sealed.credential.lease,
                sealed.credential.secret.fingerprint,
                timedelta(),
                at_work.policy.hold,
            )
            at_work.slots = replace(at_work.slots, current=key)
            at_work.secrets[sealed.label] = sealed.credential
            at_work.anchor = sealed.anchor

        broker.Broker._adopt = adopt  # type: ignore[method-assign]
    elif name == "two daemons":
        from keybroker import listening

        def take(file: str, path: str) -> int:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

        listening._lock = take
    elif name == "a locked key is lost":
        begin = broker.Broker.__init__

        def begin_without(self: Any, *args: Any, **values: Any) -> None:
            begin(self, *args, **{**values, "locked": ()})

        broker.Broker.__init__ = begin_without  # type: ignore[method-assign]
    elif name == "workers without the lock":
        from keybroker import pool

        make = pool.Pool.__init__

        def make_without(self: Any, state: Any, environment: Any, lock: Any, *rest: Any) -> None:
            make(self, state, environment, None, *rest)

        pool.Pool.__init__ = make_without  # type: ignore[method-assign,assignment]
    elif name == "others are not asked":
        broker.Broker._can_recover = lambda self, at_work, key: False  # type: ignore[method-assign]
        broker._may_be_read = lambda at_work, key: False
    elif name == "no compare-and-swap":
        from keybroker.sources.aws import store as at_aws
        from keybroker.sources.vault.store import VaultStore

        move, promote = at_aws.move_current, VaultStore.promote
        at_aws.move_current = lambda kept, version, base: move(
            kept, version, kept.describe().current
        )
        VaultStore.promote = lambda self, label, credential, base: promote(  # type: ignore[method-assign]
            self, label, credential, self.standing()
        )
    elif name == "answer before the seal":
        settled = broker.Broker.credential

        def early(self: Any, profile: str) -> Any:
            new = self._profiles[profile].slots.next
            unsealed = new and self._profiles[profile].secrets.get(new.label)
            return unsealed or settled(self, profile)

        broker.Broker.credential = early  # type: ignore[method-assign,assignment]
    else:
        raise ValueError(name)


def lock_keyring(file: Path) -> None:
    """Have what seals the cache be out of reach while a file is there."""
    from keybroker import cache, worker
    from keybroker.errors import CacheLocked

    find = cache.find_wrap_key

    def find_or_not(*arguments: Any) -> Any:
        if file.exists():
            raise CacheLocked("cache: the keyring is locked")
        return find(*arguments)

    worker.find_wrap_key = find_or_not  # type: ignore[attr-defined]


def main() -> None:
    role, text, *arguments = sys.argv[1:]
    plan = json.loads(text)
    if plan.get("mutant"):
        mutate(plan["mutant"])
    if role == "worker":
        from keybroker import worker

        if plan.get("effect") or plan.get("armed"):
            plan_death(plan)
        if plan.get("locked"):
            lock_keyring(Path(plan["locked"]))
        if plan.get("who") == "command":  # where there is no parent-death signal, it lives on
            worker._bind_to_parent = lambda parent: None
        sys.argv = ["worker", *arguments]
        worker.main()
    elif role == "daemon":
        from keybroker import listening, pool

        pool.COMMAND = (sys.executable, ENTRY, "worker", text)
        if plan.get("locked"):
            from keybroker import daemon

            daemon.UNLOCK_SECONDS = (0.2, 0.2)
        sys.argv = ["keybroker", *arguments]
        listening.main()
    else:
        from keybroker import cli, pool

        pool.COMMAND = (sys.executable, ENTRY, "worker", text)
        sys.argv = ["keybroker", *arguments]
        cli.main()


if __name__ == "__main__":
    main()
