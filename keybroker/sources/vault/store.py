"""Publish keys in a KV 2 of Vault, by its check-and-set.

A version is written in one step, if the one that was there before still is; with it our label, by
which it is known again after a crash. Nothing is written before the key was tried.

See: https://developer.hashicorp.com/vault/api-docs/secret/kv/kv-v2#create-update-secret
"""

import re
from collections.abc import Mapping
from typing import Any

from keybroker.config import Publish
from keybroker.credential import Credential, Secret
from keybroker.errors import SourceUnavailable
from keybroker.journal import write_time
from keybroker.sources.held import Held
from keybroker.sources.http import Reply
from keybroker.sources.vault.place import Place, is_versioned
from keybroker.sources.vault.server import part, said
from keybroker.vault import Vault

LABEL = "keybroker_label"
NOT_FIRST = re.compile(r"check-and-set parameter")


class VaultStore:
    """One field of one secret; the other fields stay as they are."""

    def __init__(self, place: Place, path: str, field: str) -> None:
        self._place, self._path, self._field = place, path, field

    @classmethod
    def of(
        cls,
        publish: Publish,
        vault: Vault,
        environment: Mapping[str, str],
        held: Held,
        seconds: float,
    ) -> "VaultStore":
        place = Place(vault, environment, held, seconds)
        return cls(place, publish.settings["path"], publish.settings["field"])

    def standing(self) -> str:
        return self._read()[0]

    def stage(self, label: str, credential: Credential) -> None:
        """There is nothing beside what is read: a version that is there is the newest."""

    def recover(self, label: str) -> Secret | None:
        _, data = self._read()
        if data.get(LABEL) != label:
            return None
        return self._place.secret(self._path, self._field, data)

    def promote(self, label: str, credential: Credential, base: str) -> bool:
        """
        Write a version with the key and its label, if it follows on `base`.

        Where an older one is answered, a standby is behind, or the path was deleted and begun anew.
        Which of the two, the write says: it is the active node that compares.
        """
        version, data = self._read()
        if data.get(LABEL) == label:
            return True
        if version != base and not _is_older(version, base):
            return False
        fields = {name: value for name, value in data.items() if name != "ttl"}
        ends = credential.lease.expires_at
        fields |= {self._field: credential.secret.reveal(), LABEL: label}
        fields["expires_at"] = "" if ends is None else write_time(ends)
        body = {"data": fields, "options": {"cas": int(version or 0)}}
        capability = "update" if version else "create"
        reply = self._ask(capability, lambda client: client.write_data(self._path, data=body))
        if reply.status == 400 and NOT_FIRST.search(said(reply)):
            version, data = self._read()
            if data.get(LABEL) != label and (version == base or _is_older(version, base)):
                raise SourceUnavailable(
                    f"{self._place.who}: {self._path}: an older version was answered",
                    hint="by a standby that is behind; it is asked again",
                )
            return data.get(LABEL) == label
        if reply.status >= 300:
            raise self._place.invalid(self._path, f"will not be written ({reply.status})")
        return True

    def close(self) -> None:
        self._place.server.close()

    def _read(self) -> tuple[str, Mapping[str, Any]]:
        """Return the newest version and its data, which are empty where it was deleted."""
        reply = self._ask("read", lambda client: client.read(self._path))
        answer = part(reply, "data")
        if not is_versioned(answer):
            error = self._place.nothing(self._path, reply)
            if reply.status == 404 and error.withdrawn:  # nothing was ever written there
                return "", {}
            raise error
        data = answer["data"]
        version = answer["metadata"].get("version")
        if isinstance(version, bool) or not isinstance(version, int):
            raise self._place.invalid(self._path, "answers, but not as KV 2 does")
        return str(version), data if isinstance(data, dict) else {}

    def _ask(self, capability: str, call: Any) -> Reply:
        self._place.server.begin()
        return self._place.login.ask(call, self._path, capability)


def _is_older(version: str, base: str) -> bool:
    return base.isdigit() and int(version or 0) < int(base)
