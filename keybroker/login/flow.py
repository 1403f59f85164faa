"""One sign-in, from the first page to the token: a browser that comes back, or a code."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from keybroker.errors import ConfigError, SourceInvalid, SourceUnavailable
from keybroker.login import provider_of
from keybroker.login.loopback import Loopback, read_answer
from keybroker.login.provider import BROWSER, DEVICE, LONGEST_WAIT, Device
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn

LEAST_INTERVAL, MOST_INTERVAL = 0.5, 60.0  # seconds between two asks for a code


class SigningIn:
    """
    A sign-in that is under way.

    Args:
        ways: Those that would do here, the best one first; the provider may know others.
    """

    def __init__(
        self, sign_in: SignIn, environment: Mapping[str, str], ways: Sequence[str]
    ) -> None:
        self._sign_in = sign_in
        self._ways = ways
        self._provider = provider_of(sign_in, environment)
        self._loopback: Loopback | None = None
        self._device: Device | None = None
        self._until = time.monotonic() + LONGEST_WAIT.total_seconds()
        self._next, self._interval = 0.0, 0.0

    def begin(self) -> dict[str, Any]:
        """
        Return what a person is to be told: the way, a page, and a code where there is one.

        Raises:
            KeybrokerError: The provider does not answer, or has none of the ways.
        """
        known = self._provider.flows
        way = next((one for one in self._ways if one in known), None)
        if way is None:
            raise ConfigError(
                f"login {self._sign_in.name}: the provider offers {' and '.join(known) or 'no way'}"
                f", not {' or '.join(self._ways)}"
            )
        if way == DEVICE:
            self._device = device = self._provider.device()
            self._until = min(self._until, time.monotonic() + device.lasts)
            self._pace(device.interval)
            return {"way": way, "url": device.url, "code": device.code, "whole": device.whole}
        host, port, path = self._provider.redirect
        self._loopback = Loopback(self._sign_in.name, host, port, path)
        visit = self._provider.browser(self._loopback.address)
        self._loopback.expect(visit.state, visit.redeem)
        return {"way": BROWSER, "url": visit.url, "back": self._loopback.address}

    def step(self, pasted: str | None, seconds: float) -> Tokens | None:
        """
        Wait a while for the person; None: they are still at it.

        Args:
            pasted: The address that their browser ended at, if they gave it.

        Raises:
            SourceInvalid: What was pasted is not this sign-in's: they may try again.
            KeybrokerError: It failed, or took too long.
        """
        if time.monotonic() > self._until:
            raise SourceUnavailable(
                f"login {self._sign_in.name}: nobody signed in, in time",
                hint=f"run: keybroker login {self._sign_in.name}",
            )
        if self._loopback is not None:
            if pasted is not None and not self._loopback.take(read_answer(pasted), pasted=True):
                raise SourceInvalid(
                    f"login {self._sign_in.name}: this is not where the sign-in ended",
                    hint="copy the whole address that the browser shows in the end",
                )
            return self._loopback.wait(0.0 if pasted is not None else seconds)
        assert self._device is not None, "begun"
        left = self._next - time.monotonic()
        if left > seconds:
            time.sleep(seconds)
            return None
        time.sleep(max(0.0, left))
        found = self._device.poll(self._interval)
        if isinstance(found, Tokens):
            return found
        self._pace(found)
        return None

    def close(self) -> None:
        if self._loopback is not None:
            self._loopback.close()
        self._provider.close()

    def _pace(self, interval: float) -> None:
        self._interval = min(max(interval, LEAST_INTERVAL), MOST_INTERVAL)
        self._next = time.monotonic() + self._interval
