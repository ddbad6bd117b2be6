"""Cells of a grid, one model's answers to one question: all records and then what they are, or no result at all.

`cells/NAME.jsonl` has a line for each record, `cells/NAME.json`, which is written last, what was asked of what, and the
digest of the records. Where a cell failed, `cells/NAME.failed` says why until it is run again.
"""

import glob
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Literal

from cepe_jax.data.records import DATASET
from cepe_jax.devices import describe
from cepe_jax.directories import staged, write_json
from cepe_jax.evaluation.models import ModelConfig
from cepe_jax.evaluation.perplexity import PerplexityConfig
from cepe_jax.evaluation.tasks import TaskConfig
from cepe_jax.identity import as_json, refuse_another_run
from cepe_jax.weights.files import read_json

SCHEMA = 2  # of the files of a cell and of results.json
REQUIRED = "id", "read", "seconds"  # in every record: its name, the tokens that were read for it, and in what time
FACTS = {
    "identity",
    "sha256",
    "tokenizer",
    "weights",
    "data_digest",
    "mesh",
    "device",
    "jax",
    "python",
    "commit",
    "date",
}
FACTS |= {"seconds", "peak_memory"}  # of every cell; without one of these it is none


@dataclass(frozen=True)
class Cell:
    family: Literal["perplexity", "tasks"]
    model: str  # as the grid calls it
    data: str
    kind: str  # of contexts; "" of a task
    value: int  # where on the axis: chunks of context, or what the task counts
    model_config: ModelConfig
    data_config: PerplexityConfig | TaskConfig

    @property
    def name(self) -> str:
        return ".".join([self.model, self.data, *([self.kind] if self.kind else []), str(self.value)])

    @property
    def identity(self) -> dict:
        """The settings that the records depend on, by their dotted names.

        Of the axis that is its longest value where there is room for it in every window, or where there are
        demonstrations for it in every draw; else nothing. Metrics are of what is recorded.
        """
        axis, unread = ("chunks", "kinds") if self.family == "perplexity" else ("axis", "metrics")
        data = as_json(self.data_config)
        del data[unread]
        longest = max(data.pop(axis))
        if self.family == "perplexity" or data["family"] == "icl":
            data[axis] = longest
        settings = {"model": as_json(self.model_config), "data": data}
        return {"schema": SCHEMA, "family": self.family} | dict(_dotted(settings))

    def path(self, out: Path, suffix: str) -> Path:
        return out / "cells" / f"{self.name}.{suffix}"


def _dotted(settings: dict, group: str = "") -> Iterable[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", value


class Missing(ValueError):
    """A cell has no result, and why."""


def write(out: Path, cell: Cell, records: Iterable[dict], *facts: dict) -> None:
    """The cell's records and facts are in `out`, facts as they are after the last record.

    ValueError, and nothing is there, for records that are no result.
    """
    path, ids, digest = cell.path(out, "jsonl"), set(), hashlib.sha256()
    with staged(path) as place:
        with open(place, "wb") as file:
            for record in records:
                if lacking := [name for name in REQUIRED if name not in record]:
                    raise ValueError(f"a record of {cell.name} lacks {', '.join(lacking)}")
                if record["id"] in ids:
                    raise ValueError(f"{cell.name} has two records of {record['id']}: names must differ")
                ids.add(record["id"])
                line = f"{json.dumps(record, allow_nan=False)}\n".encode()
                digest.update(line)
                file.write(line)
        if not ids:
            raise ValueError(f"{cell.name} has no record: its data is empty")
    names = {name: getattr(cell, name) for name in ("family", "model", "data", "kind", "value")}
    counts = {"records": len(ids), "sha256": digest.hexdigest()}
    result = {"schema": SCHEMA, "name": cell.name} | names | counts
    for some in facts:
        result |= some
    write_json(cell.path(out, "json"), result | {"identity": cell.identity})


def read(out: Path, cell: Cell) -> tuple[dict, list[dict]]:
    """The facts and the records of a finished cell; Missing for one that is not, or whose files are no result.

    ValueError for one of the same name that was run with other settings.
    """
    path, records = cell.path(out, "json"), cell.path(out, "jsonl")
    if not path.exists():
        failed = cell.path(out, "failed")
        raise Missing(json.loads(failed.read_text())["message"] if failed.exists() else "not run yet")
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        raise Missing(f"{path} is damaged: run it again") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("identity"), dict):
        raise Missing(f"{path} lacks identity: run it again")
    refuse_another_run(path, facts["identity"], cell.identity)
    if lacking := FACTS - facts.keys():
        raise Missing(f"{path} lacks {', '.join(sorted(lacking))}: run it again")
    content = records.read_bytes() if records.exists() else b""
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise Missing(f"{records} is not what was measured: run it again")
    return facts, [json.loads(line) for line in content.splitlines()]


def write_failure(out: Path, cell: Cell, message: str, trace: str) -> None:
    write_json(cell.path(out, "failed"), {"name": cell.name, "message": message, "traceback": trace})


def provenance() -> dict:
    """What computes in this process, and by which code."""
    import jax

    return {
        "device": describe(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("cepe-jax", "jaxlib", "flax", "numpy")},
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def weights_at(path: Path) -> str | None:
    """The digest that stands beside the weights in our format; None of others, for it would take reading them all."""
    hashes = path / "hash.json"
    return read_json(hashes)["all"] if hashes.exists() else None


def places(config: PerplexityConfig | TaskConfig) -> list[Path]:
    """Where what is asked about is read from; none where it is made up."""
    given = [config.data] if isinstance(config, PerplexityConfig) else [config.data, config.haystack]
    return [path for path in given if path is not None]


def data_at(config: PerplexityConfig | TaskConfig, out: Path) -> str | None:
    """A digest of what is asked about: of a dataset that of its index, which has those of its records; of other files
    that of their names, sizes and times, but of what is below `out`. None where a place is missing.
    """
    digest = hashlib.sha256()
    for place in places(config):
        if not place.exists():
            return None
        if (place / DATASET).exists():
            digest.update((place / DATASET).read_bytes())
            continue
        # As `data.sources.plan`, into folders that are links.
        inside = glob.glob("**", root_dir=place, recursive=True, include_hidden=True) if place.is_dir() else [""]
        for name in sorted(inside):
            path = place / name
            if path.is_file() and not path.resolve().is_relative_to(out.resolve()):
                facts = path.stat()
                digest.update(f"{name!a} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # run from a checkout


def _commit() -> str | None:
    """Of the checkout that this file is in, and whether it has changes; None where there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
