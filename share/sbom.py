"""What is in a wheel and what it needs, in CycloneDX's words, for `.dist-info/sboms`."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from keybroker import __version__

ROOT = Path(__file__).parent.parent
NAME = "keybroker.cdx.json"


def write(folder: Path) -> None:
    """Write the file: the same for the same source, so without a time and a serial number."""
    (folder / NAME).write_text(json.dumps(sbom(), indent=2) + "\n")


def sbom() -> dict[str, Any]:
    """
    Return keybroker and what it asks for.

    Which version of that is installed is not known when a wheel is built: `make dist` has it.

    See: https://cyclonedx.org/docs/1.6/json/
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = f"pkg:pypi/keybroker@{__version__}"
    needed = [component(one) for one in sorted(project["dependencies"])]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": ours,
                "name": project["name"],
                "version": __version__,
                "description": project["description"],
                "licenses": [{"license": {"id": project["license"]}}],
                "purl": ours,
            }
        },
        "components": needed,
        "dependencies": [
            {"ref": ours, "dependsOn": [one["bom-ref"] for one in needed]},
            *({"ref": one["bom-ref"]} for one in needed),
        ],
    }


def component(requirement: str) -> dict[str, Any]:
    """Return a requirement, as `httpx[socks]>=0.27`."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}",
        "name": name,
        "purl": f"pkg:pypi/{name}",
        "properties": [{"name": "keybroker:requirement", "value": requirement}],
    }
