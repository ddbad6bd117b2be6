"""The settings of a run as JSON, and the refusal of a directory that a run with other settings has made."""

import dataclasses
import json
from pathlib import Path


def as_json(value):
    """Return dataclasses as objects and everything else that JSON does not know, such as a path, as text."""
    return json.loads(json.dumps(value, default=lambda v: vars(v) if dataclasses.is_dataclass(v) else str(v)))


# Settings that earlier versions had, or wrote for other runs too, with the value under which a run is the same without.
REMOVED = {"neighbours": "none", "sinks": 4}


def _without_removed(stored: dict) -> dict:
    names = {key: key.rpartition(".")[2] for key in stored}
    values = {key: value for key, value in stored.items() if names[key] not in REMOVED or value != REMOVED[names[key]]}
    return {key: _without_removed(value) if isinstance(value, dict) else value for key, value in values.items()}


def refuse_another_run(where: Path, stored: dict, present: dict) -> None:
    """Raise ValueError that names the first setting in which two runs' identities differ."""
    stored, present = _without_removed(stored), _without_removed(present)
    for key in sorted(set(stored) | set(present)):
        if stored.get(key) != present.get(key):
            differing = f"{key} is {json.dumps(stored.get(key))} there and {json.dumps(present.get(key))} here"
            raise ValueError(f"{where}: is of another run, {differing}: use another directory, or remove it")


def as_of(stored: dict, present: dict) -> dict:
    """`present` without the settings that `stored` lacks, which are newer than it; those of settings in it too."""
    return {
        key: as_of(stored[key], value) if isinstance(value, dict) and isinstance(stored[key], dict) else value
        for key, value in present.items()
        if key in stored
    }
