"""
A small LLM gateway with a key API, for `keybroker demo` and for tests.

It answers as LiteLLM does, expired and revoked keys included, and greets instead of calling a
model. It listens on loopback only and forgets everything when it stops: nothing to put in
production. It shares no code with the adapters that are tried against it.
"""

from keybroker.devgateway.gateway import DevGateway, LiveKey, Seen
from keybroker.devgateway.keys import Options

__all__ = ["DevGateway", "LiveKey", "Options", "Seen"]
