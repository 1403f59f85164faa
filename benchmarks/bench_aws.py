"""What it costs to look at secrets of AWS's: many of them, of one."""

from __future__ import annotations

import os
import resource
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from keybroker import aws as accounts
from keybroker.config import Profile, read_profile
from keybroker.credential import Lease
from keybroker.document import Where
from keybroker.journal import decode_lease
from keybroker.pool import Answer, Pool
from tests.servers.aws import Aws, allow
from tests.servers.awsfaults import Front

MANY = 100
ROUNDS = 9
SECONDS = 30.0
ACTIONS = ("DescribeSecret", "GetSecretValue")
AT_ONCE = "BatchGetSecretValue"


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of a worker that looks at secrets whose versions it knows."""
    del say
    state = folder / "looks"
    state.mkdir(mode=0o700)
    with Aws() as aws, Front(aws) as front:
        for number in range(MANY):
            aws.put(f"llm/{number}", f"sk-{secrets.token_hex(24)}")
        policy = allow([f"secretsmanager:{one}" for one in (*ACTIONS, AT_ONCE)])
        environment = {"PATH": os.defpath, "HOME": str(folder)}
        environment |= aws.environment(aws.user("reader", policy), front.url)
        profiles = [_profile(number) for number in range(MANY)]
        known = [_lease(one) for one in _poll(state, environment, profiles, [None] * MANY)[1]]

        def cpu(count: int) -> float:
            return _poll(state, environment, profiles[:count], known[:count])[0]

        front.forget()
        rounds = interleaved({"one": lambda: cpu(1), "many": lambda: cpu(MANY)}, ROUNDS)
        calls = front.count(AT_ONCE) / (ROUNDS + 1)
    about = f"CPU of a worker that looks at {MANY} secrets, of one that looks at one"
    yield Figure("aws.many", about, ratio(rounds, "many", "one"), ROUNDS, 1.8)
    about = f"requests with which it looks at {MANY}"
    yield Figure("aws.many.requests", about, calls, ROUNDS, MANY / 20, unit="")


def _profile(number: int) -> Profile:
    source = {"type": "aws", "secret": f"llm/{number}", "region": "us-east-1"}
    raw = {"base_url": "http://127.0.0.1:9", "source": source}
    return read_profile(f"aws-{number}", raw, Where({}, "benchmarks"))


def _poll(
    state: Path,
    environment: Mapping[str, str],
    profiles: Sequence[Profile],
    known: Sequence[Lease | None],
) -> tuple[float, list[Answer]]:
    """Have a new worker look at secrets; return its CPU seconds, and what it answered in order."""
    before = _children()
    pool = Pool(state, environment, None, {"aws": accounts.VARIABLES})
    wanted = [
        pool.send("aws", "poll", SECONDS, profile=profile, lease=lease)
        for profile, lease in zip(profiles, known, strict=True)
    ]
    answers: dict[int, Answer] = {}
    while len(answers) < len(wanted):
        answers.update({one.id: one for one in pool.receive(SECONDS)})
    pool.close()
    for one in answers.values():
        if one.error is not None:
            raise UnmeasurableError(one.error.message)
    return _children() - before, [answers[number] for number in wanted]


def _lease(answer: Answer) -> Lease:
    assert answer.ok is not None, "which was looked at"
    return decode_lease(answer.ok["credential"]["lease"])


def _children() -> float:
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime
