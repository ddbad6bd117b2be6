"""The settings of a run as JSON, and the refusal of a directory that a run with other settings has made."""

import dataclasses
import json
from pathlib import Path


def as_json(value):
    """Return dataclasses as objects and everything else that JSON does not know, such as a path, as text."""
    return json.loads(json.dumps(value, default=lambda v: vars(v) if dataclasses.is_dataclass(v) else str(v)))


# Settings that some versions lack, each with the value under which a run is the same without it.
NEUTRAL = {
    "neighbours": "none",
    "shares": {},
    "separator": "",
    "separator_as_text": False,
    "context": "encoder",
    "rope_theta": 0.0,
    "mix_by": "weight",
}


def _comparable(settings: dict) -> dict:
    """Return the settings that make a run: neither those without a value nor those that change nothing.

    Keys may be dotted. A full cache was stored with the sinks of a rolling one. Before there were factors, stages of
    one part were stored with the parts of a CEPE as what trains.
    """
    values = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        kind = settings.get(f"{group}.kind" if group else "kind")
        one_part = key == "train" and "lora" not in settings and settings.get("stage") in ("lm", "mlm")
        without = value is None or (name in NEUTRAL and value == NEUTRAL[name])
        if without or one_part or (name, kind) == ("sinks", "full"):
            continue
        values[key] = _comparable(value) if isinstance(value, dict) else value
    return values


def refuse_another_run(where: Path, stored: dict, present: dict) -> None:
    """Raise ValueError that names the first setting in which two runs' identities differ."""
    before, now = _comparable(stored), _comparable(present)
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            differing = f"{key} is {json.dumps(stored.get(key))} there and {json.dumps(present.get(key))} here"
            raise ValueError(f"{where}: is of another run, {differing}: use another directory, or remove it")


def as_of(stored: dict, present: dict) -> dict:
    """Return `present` without the settings that `stored` lacks, which are newer than it; those of settings in it too.

    A newer one of which the value is known that changes nothing stays if it has another.
    """
    return {
        key: as_of(stored[key], value) if isinstance(value, dict) and isinstance(stored.get(key), dict) else value
        for key, value in present.items()
        if key in stored or (key in NEUTRAL and value != NEUTRAL[key])
    }
