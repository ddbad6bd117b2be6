"""The launcher for Cloud TPU slices, with a gcloud that notes what it is asked: no worker, no network."""

import inspect
import os
import subprocess
from pathlib import Path

import pytest
from jax._src.clusters import ClusterEnv

SCRIPT = Path(__file__).parents[1] / "scripts/launch_tpu.sh"
# The command runs here once for each of the run's workers, with STATUS for it to end with; "-" cannot be reached.
GCLOUD = """#!/usr/bin/env bash
for argument in "$@"; do printf '%s\\0' "$argument"; done >>"$HOME/arguments"; printf '\\n' >>"$HOME/arguments"
case "$*" in *flock*) ;; *) exit 0 ;; esac
echo run >>"$HOME/runs"
first=0
for STATUS in $(cut -d, -f"$(wc -l <"$HOME/runs")" <<<"$RUNS"); do
    export STATUS
    if [ "$STATUS" = - ]; then status=255; else (cd "$HOME" && bash -c "${!##--command=}"); status=$?; fi
    [ "$first" != 0 ] || first=$status
done
exit "${GCLOUD_STATUS:-$first}"
"""


def launch(home: Path, *arguments: str, runs: str = "0 0", **settings: str) -> tuple[subprocess.CompletedProcess, list]:
    """What the launcher did, and the arguments of each call of gcloud; `runs`: the workers' statuses, run by run."""
    programs = {
        "gcloud": GCLOUD,
        "git": '#!/usr/bin/env bash\nwhile [ "$1" != -o ]; do shift; done; echo archive >"$2"\n',
        "cepe_jax/.venv/bin/activate": "",
    }
    for name, text in programs.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    flags = os.environ | {"PATH": f"{home}:{os.environ['PATH']}", "HOME": str(home), "RUNS": runs, "PAUSE": "0"}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=flags | settings, capture_output=True, text=True)
    calls = (home / "arguments").read_bytes().split(b"\0\n") if (home / "arguments").exists() else []
    return done, [call.decode().split("\0") for call in calls if call]


def test_the_command_runs_on_all_workers(tmp_path):
    done, calls = launch(tmp_path, "pod", "zone-a", "printf", "%s\\n", "scripts/train.py", "--mix={a: 1, b: 2}")
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
    worker = ["scripts/train.py", "--mix={a: 1, b: 2}", "launch_tpu.sh: a worker ended with status 0"]
    assert done.stdout.splitlines() == worker * 2


@pytest.mark.parametrize(
    ("runs", "settings", "status"),
    [
        ("3 70,134 -,0 0", {"MINUTES": "0"}, 0),  # begun again until it succeeds
        ("3 3,3 3,3 3,3 3", {"MINUTES": "0", "RESTARTS": "3"}, 1),
        ("3 134", {}, 1),  # it failed at once
        ("3 1", {"MINUTES": "0"}, 1),  # one refuses, whatever the others say
        ("75 75,75 134,75 75,0 0", {"RESTARTS": "0"}, 0),  # stopped: no failure
        ("75 1", {}, 1),
        ("- -,0 0", {}, 0),  # no worker could be reached for a while
        ("- -,- -", {"RESTARTS": "1"}, 1),
        ("0 -,0 0", {"MINUTES": "0"}, 0),
        ("75 75,3 3,0 0", {"MINUTES": "0", "GCLOUD_STATUS": "0"}, 0),  # old versions of gcloud never fail
    ],
)
def test_a_command_is_run_again_by_what_its_workers_say(tmp_path, runs, settings, status):
    command = ["bash", "-c", "exit $STATUS"]
    done, calls = launch(tmp_path, "pod", "zone-a", *command, runs=runs, **settings)
    assert done.returncode == status, done.stderr
    assert len(calls) == 2 + len(runs.split(","))
    assert ("launch_tpu.sh: failed" in done.stderr) == (status == 1)


@pytest.mark.parametrize(("settings", "port"), [({}, "8476"), ({"JAX_COORDINATOR_PORT": "8482"}, "8482")])
def test_workers_meet_on_an_open_port(tmp_path, settings, port):
    """The variable is JAX's: only its source says so."""
    done, _ = launch(tmp_path, "pod", "zone-a", "printenv", "JAX_COORDINATOR_PORT", **settings)
    assert done.stdout.splitlines()[::2] == [port] * 2
    assert 'environ.get("JAX_COORDINATOR_PORT")' in inspect.getsource(ClusterEnv)


def test_its_usage(tmp_path):
    done, calls = launch(tmp_path, "pod", "zone-a")
    assert (done.returncode, calls) == (2, [])
    assert "Usage: bash scripts/launch_tpu.sh TPU ZONE COMMAND..." in done.stderr
