"""
Users of a real PostgreSQL, made and ended by OpenBao's database engine.

See: https://openbao.org/docs/secrets/databases/postgresql/
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.servers.postgres import Postgres, create
from tests.servers.vaultapi import Api

_CREATE = (
    """CREATE ROLE "{{name}}" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';"""
)


class Database:
    """
    A database and the engine at a server that manages its users, as a context.

    Attributes:
        mount: Where the engine is: a name of its own.
    """

    def __init__(self, server: Api) -> None:
        self._server = server
        self.mount = f"database-{secrets.token_hex(4)}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-pg-")
            data = create(Path(stack.enter_context(temporary)), over_tcp="scram-sha-256")
            self._postgres = stack.enter_context(Postgres(data))
            password = secrets.token_hex(16)
            self._query(f"create role manager superuser login password '{password}'")
            where = f"127.0.0.1:{self._postgres.port}/postgres?sslmode=disable"
            connection = {
                "plugin_name": "postgresql-database-plugin",
                "connection_url": f"postgresql://{{{{username}}}}:{{{{password}}}}@{where}",
                "username": "manager",
                "password": password,
                "allowed_roles": ["*"],
            }
            self._server.do("POST", f"sys/mounts/{self.mount}", {"type": "database"})
            stack.callback(self._server.request, "DELETE", f"sys/mounts/{self.mount}")
            self._server.do("POST", f"{self.mount}/config/postgres", connection)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _query(self, sql: str) -> str:
        return self._postgres.query(sql, database="postgres")

    def dynamic_role(self, role: str, default_ttl: str = "1h", max_ttl: str = "24h") -> str:
        """Let each read make another user, with a lease; returns the path to read."""
        ttls = {"default_ttl": default_ttl, "max_ttl": max_ttl}
        options = {"db_name": "postgres", "creation_statements": [_CREATE], **ttls}
        self._server.do("POST", f"{self.mount}/roles/{role}", options)
        return f"{self.mount}/creds/{role}"

    def static_role(self, role: str, rotation_period: str = "24h") -> str:
        """Make one user, whose password the engine changes; returns the path to read."""
        self._query(f'create role "{role}" login')
        options = {"db_name": "postgres", "username": role, "rotation_period": rotation_period}
        self._server.do("POST", f"{self.mount}/static-roles/{role}", options)
        return f"{self.mount}/static-creds/{role}"

    def rotate(self, role: str) -> None:
        """Change the password of a static role now."""
        self._server.do("POST", f"{self.mount}/rotate-role/{role}")

    def logs_in(self, username: str, password: str) -> bool:
        """Whether the database lets this user in."""
        return self._postgres.logs_in(username, password)

    def users(self) -> set[str]:
        """The users that exist, made by whomever."""
        return set(self._query("select rolname from pg_roles where rolcanlogin").split())

    def stop(self) -> None:
        """Start an outage of the database; the engine is still there."""
        self._postgres.stop()

    def start(self) -> None:
        """End the outage."""
        self._postgres.start()
