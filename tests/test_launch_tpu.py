"""The launcher for Cloud TPU slices, with a gcloud that notes what it is asked: no worker, no network."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/launch_tpu.sh"
GCLOUD = """#!/usr/bin/env bash
for argument in "$@"; do printf '%s\\0' "$argument"; done >>"$NOTES/arguments"; printf '\\n' >>"$NOTES/arguments"
case "$*" in *flock*) ;; *) exit 0 ;; esac
echo run >>"$NOTES/runs"
[ "$(wc -l <"$NOTES/runs")" -gt "$FAILURES" ]
"""


def launch(notes: Path, *arguments: str, failures=0, **settings: str) -> tuple[subprocess.CompletedProcess, list]:
    """What the launcher did, and the arguments of each call of gcloud."""
    (notes / "gcloud").write_text(GCLOUD)
    (notes / "gcloud").chmod(0o755)
    (notes / "git").write_text('#!/usr/bin/env bash\nwhile [ "$1" != -o ]; do shift; done; echo archive >"$2"\n')
    (notes / "git").chmod(0o755)
    flags = os.environ | {"PATH": f"{notes}:{os.environ['PATH']}", "NOTES": str(notes), "FAILURES": str(failures)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=flags | {"PAUSE": "0"} | settings, capture_output=True, text=True
    )
    calls = (notes / "arguments").read_bytes().split(b"\0\n") if (notes / "arguments").exists() else []
    return done, [call.decode().split("\0") for call in calls if call]


def test_the_command_runs_on_all_workers(tmp_path):
    done, calls = launch(tmp_path, "pod", "zone-a", "python", "scripts/train.py", "--mix={a: 1, b: 2}")
    assert done.returncode == 0, done.stderr
    copy, install, run = calls
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert copy[5:] == ["pod:cepe_jax.tar.gz", "--zone=zone-a", "--worker=all"]
    assert not Path(copy[4]).exists()
    for call in install, run:
        assert call[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a", "--worker=all"]
    assert 'install_into .venv ".[tpu]"' in install[-1]
    subprocess.run(["bash", "-n", "-c", install[-1].removeprefix("--command=")], check=True)
    # What the workers' shell makes of the last command is what was given here.
    _, _, words = run[-1].partition("cepe_jax.lock")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["python", "scripts/train.py", "--mix={a: 1, b: 2}"]


@pytest.mark.parametrize(
    ("failures", "settings", "status", "runs"),
    [
        (2, {"MINUTES": "0"}, 0, 3),  # begun again until it succeeds
        (9, {"MINUTES": "0", "RESTARTS": "3"}, 1, 4),
        (1, {}, 1, 1),  # it failed at once
    ],
)
def test_a_command_that_fails_is_run_again(tmp_path, failures, settings, status, runs):
    done, calls = launch(tmp_path, "pod", "zone-a", "python", "x.py", failures=failures, **settings)
    assert done.returncode == status
    assert len(calls) == 2 + runs
    assert ("launch_tpu.sh: failed" in done.stderr) == (status == 1)


def test_its_usage(tmp_path):
    done, calls = launch(tmp_path, "pod", "zone-a")
    assert (done.returncode, calls) == (2, [])
    assert "Usage: bash scripts/launch_tpu.sh TPU ZONE COMMAND..." in done.stderr
