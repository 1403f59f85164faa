"""
Three OpenBao servers with Raft, of which one leads.

Standbys answer reads themselves, from what they have received so far: a read may give what was
there before the last write, or 404, or for a new engine 400. Writes they pass on to the leader;
where that fails, or the request says `X-Vault-No-Request-Forwarding: true`, they answer with a
redirect, 307, to the leader.

See: https://openbao.org/docs/concepts/ha/
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.servers.processes import Port, wait_until
from tests.servers.vault import Server, listener


class Cluster:
    """
    The servers, as a context. A process that starts again unseals itself and has its data.

    Attributes:
        nodes: Each asked at its own `url`, with the one root token.
        token: This token.
    """

    nodes: list[Server]

    def __init__(self, size: int = 3) -> None:
        self._size = size
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-bao-")
            folder = Path(stack.enter_context(temporary))
            (folder / "seal.key").write_bytes(os.urandom(32))
            ports = [stack.enter_context(Port()).number for _ in range(2 * self._size)]
            self.nodes = []
            for number in range(self._size):
                port, inner = ports[2 * number : 2 * number + 2]
                node = self._node(folder / f"node-{number}", port, inner)
                self.nodes.append(node)
                stack.callback(node.kill)  # a second faster than in good order
            self._form()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _node(self, folder: Path, port: int, inner: int) -> Server:
        folder.mkdir()
        (folder / "data").mkdir()
        storage: dict[str, Any] = {
            "path": str(folder / "data"),
            "node_id": folder.name,
            "performance_multiplier": 1,  # elections take a second or two, not ten
            "autopilot_update_interval": "200ms",  # who has joined may soon vote
            "autopilot_reconcile_interval": "200ms",
        }
        if self.nodes:
            storage["retry_join"] = {"leader_api_addr": self.nodes[0].url}
        key = f"file://{folder.parent}/seal.key"
        configuration = {
            "storage": {"raft": storage},
            "cluster_addr": f"https://127.0.0.1:{inner}",
            "listener": listener(port, cluster_address=f"127.0.0.1:{inner}"),
            "seal": {"static": {"current_key_id": "1", "current_key": key}},
        }
        node = Server(folder, port, configuration)
        node.audit = folder.parent / "audit.log"  # the same for all, or they refuse to lead
        return node

    def _form(self) -> None:
        """Let the first be a cluster by itself, and the others join it."""
        first, *others = self.nodes
        first.start()
        first.initialize(recovery_shares=1, recovery_threshold=1)
        self.token = first.token
        self.wait_for_leader()
        autopilot = "sys/storage/raft/autopilot/configuration"
        first.do("POST", autopilot, {"server_stabilization_time": "200ms"})
        for node in others:
            node.token = self.token
            node.mark = first.mark
            node.start()
        for node in self.nodes:
            node.wait_until_ours()
        if not wait_until(lambda: self.voters() == self._size, 30):
            raise TimeoutError(f"{self.voters()} of {self._size} servers vote\n{first.log()}")

    def voters(self) -> int:
        """How many servers an election counts."""
        found = self.leader().do("GET", "sys/storage/raft/configuration")
        return sum(server["voter"] for server in found["data"]["config"]["servers"])

    def leader(self) -> Server:
        """
        Whoever leads now.

        Raises:
            LookupError: Nobody does.
        """
        for node in self.nodes:
            if _leads(node):
                return node
        raise LookupError("no server leads")

    def standbys(self) -> list[Server]:
        """Those that run and do not lead."""
        return [node for node in self.nodes if node.alive() and not _leads(node)]

    def wait_for_leader(self, seconds: float = 30) -> Server:
        """Wait for the end of an election; returns who leads."""
        if not wait_until(lambda: any(map(_leads, self.nodes)), seconds):
            logs = "\n\n".join(node.log() for node in self.nodes if node.alive())
            raise TimeoutError(f"no server leads\n{logs}")
        return self.leader()

    def wait_for_standbys(self, path: str, seconds: float = 30) -> None:
        """Wait until those that stand by read what the leader does."""

        def read(node: Server) -> tuple[int, object]:
            status, said = node.request("GET", path)
            return status, said.get("data")

        wanted = read(self.leader())
        if not wait_until(lambda: all(read(n) == wanted for n in self.standbys()), seconds):
            raise TimeoutError(f"{path} is not {wanted} everywhere")


def _leads(node: Server) -> bool:
    """Whether it says so and can be asked; one that hangs says nothing."""
    return node.alive() and node.health(patience=0.5).get("standby") is False
