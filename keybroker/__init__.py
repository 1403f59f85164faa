"""Keys for an LLM gateway: minted, verified, handed out, rotated and revoked."""

__version__ = "0.1.0"
