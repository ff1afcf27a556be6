"""engine.json beside an engine: what was built from what, so that it is built once.

Written last and in one step, so a folder that has it is complete.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtune.configs.files import hash_file, write_json
from trtune.precision.runtime.api import BuildInfo, Candidate

log = logging.getLogger(__name__)

ENGINE_JSON = "engine.json"


def device_name() -> str:
    """The processor and operating system, for the record."""
    return f"{platform.processor() or platform.machine()}, {platform.system()}"


def write_engine_json(folder: Path, info: BuildInfo, candidate: Candidate) -> None:
    """Write `folder/engine.json`: `info`, the hashes it was made from, and the engine's own hash.

    `read_engine_json` reads it back.
    """
    write_json(
        folder / ENGINE_JSON,
        {
            "schema": 1,
            "backend": info.backend,
            "key": candidate.key,
            "hashes": candidate.hashes,
            "versions": dict(info.versions),
            "device": device_name(),
            "file": info.path.name if info.path else None,
            "file_sha256": hash_file(info.path) if info.path else None,
            "size_bytes": info.size_bytes,
            "seconds": round(info.seconds, 6),
            "precisions": dict(info.precisions),
            "not_honoured": list(info.not_honoured),
            "reason": info.reason,
            "details": dict(info.details),
            "log": info.log,
        },
    )


def read_engine_json(folder: Path) -> BuildInfo:
    """The `BuildInfo` that `write_engine_json` wrote; its path is inside `folder` as it is now.

    Raises OSError if there is none, ValueError or KeyError if it is something else.
    """
    value = json.loads((folder / ENGINE_JSON).read_text(encoding="utf-8"))
    return BuildInfo(
        backend=value["backend"],
        path=folder / value["file"] if value["file"] else None,
        size_bytes=value["size_bytes"],
        precisions=value["precisions"],
        not_honoured=tuple(value["not_honoured"]),
        seconds=value["seconds"],
        versions=value["versions"],
        log=value["log"],
        reason=value["reason"],
        details=value.get("details", {}),
    )


def reusable(
    folder: Path,
    candidate: Candidate,
    *,
    backend: str,
    versions: Mapping[str, str],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> BuildInfo | None:
    """What is already built in `folder`, if it is of exactly this candidate, backend and versions.

    `settings` are those of the backend, if it has any (`details["settings"]` of what it built).
    None if there is nothing, or if anything differs; the log then says which part. An engine file
    that is missing or was changed since counts as different.
    """
    if not (folder / ENGINE_JSON).is_file():
        return None
    try:
        value = json.loads((folder / ENGINE_JSON).read_text(encoding="utf-8"))
        info = read_engine_json(folder)
        found = {**value["hashes"], "backend": info.backend, "versions": dict(info.versions)}
        found["settings"] = info.details.get("settings", {})
        digest = value["file_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s cannot be read (%s): building again", folder / ENGINE_JSON, error)
        return None
    wanted = {**candidate.hashes, "backend": backend, "versions": dict(versions)}
    wanted["settings"] = dict(settings)
    changed = [part for part in wanted if found.get(part) != wanted[part]]
    if info.path and not (info.path.is_file() and hash_file(info.path) == digest):
        changed.append("engine file")
    if changed:
        log.info("%s was built from something else: %s changed", folder, ", ".join(changed))
        return None
    log.info("reusing %s in %s", backend, folder)
    return info
