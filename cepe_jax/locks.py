"""A lock with an owner, also on file systems that several machines share."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from cepe_jax.exits import FAULT

log = logging.getLogger(__name__)

LEASE = 120.0  # seconds without a sign of life after which an owner on another host is dead
BEAT = 15.0  # seconds between an owner's signs of life


@contextmanager
def held(lock: Path, place: Path) -> Iterator[None]:
    """Hold the lock file of `place` in the block. ValueError that names its owner, if another process holds it.

    A lock is taken over at once if its owner ran on this host and is gone, and from an owner on another host after
    `LEASE` seconds in which it gave no sign of life. A process that loses its lock ends at once.
    """
    lease = SoftFileLease(lock, lease_duration=LEASE, heartbeat_interval=BEAT, on_compromise=_end)
    beats = []

    def owner_lives() -> bool:
        """Return whether waiting is vain: the library takes over from a dead owner on this host by itself."""
        owner = lease.owner
        if owner is None or owner.hostname == _this_host():
            return owner is not None
        with suppress(FileNotFoundError):
            beats.append(lock.stat().st_mtime_ns)
        if len(beats) == 1:
            log.info("%s: waiting up to %.0f s for a sign of life of %s", place, LEASE, _description(lease))
        return len(set(beats)) > 1

    try:
        lease.acquire(timeout=2 * LEASE, poll_interval=BEAT / 15, cancel_check=owner_lives)
    except (Timeout, LeaseSettingsMismatch):
        raise ValueError(
            f"{place} is being written by {_description(lease)}: wait for its end, or give another place"
        ) from None
    try:
        yield
    finally:
        lease.release()


def _description(lease: SoftFileLease) -> str:
    """Return the lock's owner in words."""
    try:
        alive = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.stat(lease.lock_file).st_mtime))
    except FileNotFoundError:
        alive = ""
    if (owner := lease.owner) is None or not alive:
        return f"a process without a name in {lease.lock_file} (remove the file if there is none)"
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}, alive at {alive}"


@cache
def _this_host() -> str:
    """Return the name that locks have for this host; that of a container includes its space of process ids."""
    with tempfile.TemporaryDirectory() as home, SoftFileLease(Path(home) / "lock") as lease:
        return lease.owner.hostname


def _end(loss: LeaseCompromise) -> None:
    """End this process if its lock is gone: another process may be writing. Warn if it cannot be renewed."""
    if loss.reason == "refresh-failed":
        log.warning("%s cannot be renewed (%s): another host may take it over", loss.lock_file, loss.error)
        return
    message = f"{loss.lock_file}: the lock was lost ({loss.reason}), another process may be writing: start again"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    os._exit(FAULT)
