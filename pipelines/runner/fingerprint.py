"""What makes a result the same result: a canonical form of literal settings, its hash, and the difference of two."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

ABSENT = "absent"  # a setting that the code did not have then, or has no more


def canonical(value: Any) -> Any:
    """JSON values of a config. An object with an `identity()` method is what that returns: so a folder becomes its content.

    Raises TypeError for anything else than literals, lists, dicts and dataclasses: a value without a canonical form would
    silently fork fingerprints.
    """
    if hasattr(value, "identity"):
        return canonical(value.identity())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): canonical(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no canonical form")


def fingerprint(payload: dict) -> str:
    """16 hex digits of a canonical payload."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Human-readable changes between two canonical values, field by field: 'mlm_ratio: 0.4 -> 0.3'."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}[{i}]")
        ]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
