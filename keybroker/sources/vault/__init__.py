"""Vault and OpenBao: a server, a way to log in there, and what is read with it."""
