"""How scripts end: bad input in one line, a bug with its traceback, and their exit statuses."""

import errno
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cepe_jax.exits import in_one_line, run, status_of

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a\n  b"), 1),
        (FileNotFoundError("a b"), 1),
        (PermissionError("a b"), 1),
        (OSError("a b"), 70),  # a full disk
        (ConnectionResetError("a b"), 70),
        (BrokenPipeError("a b"), 70),  # of another pipe than standard output
    ],
)
def test_run_says_bad_input_in_one_line(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status
    assert capsys.readouterr().err.endswith(": a b\n")


def test_a_long_value_is_shown_by_its_ends():
    line = in_one_line(ValueError(f"seed is {'9' * 5_000}: give less"))
    assert line.startswith("seed is 999")
    assert line.endswith("999: give less")
    assert len(line) < 1_000


PLACES = {
    "nope": (lambda home: (home / "nope").read_text(), "nope: no such file"),
    "a directory": (lambda home: (home / "dir").read_text(), "dir: is a directory: give a file"),
    "below a file": (lambda home: (home / "file" / "x").mkdir(), "file/x: .* give another place"),
    "a file's list": (lambda home: list((home / "file").iterdir()), "file: is no directory"),
    "a file where it makes a directory": (lambda home: (home / "file").mkdir(exist_ok=True), "file: is there already"),
    "a name that is too long": (lambda home: (home / ("x" * 300)).read_text(), "x{300}: File name too long"),
    "renamed over a directory": (lambda home: (home / "file").rename(home / "dir"), "dir: is a directory: give a file"),
}


@pytest.mark.parametrize("case", PLACES)
def test_run_names_a_refused_place_and_the_mend(case, tmp_path, capsys):
    """And not a number of the system's, wherever the place comes from."""
    use, said = PLACES[case]
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run(lambda: use(tmp_path))
    assert ended.value.code == 1
    assert re.fullmatch(f"[^\n]*: {tmp_path}/{said}[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, 70), (errno.EDQUOT, 70), (errno.EFBIG, 70), (errno.EROFS, 1), (errno.EACCES, 1), (errno.EPERM, 1)],
)
def test_room_may_come_and_permission_does_not(number, status):
    assert status_of(OSError(number, "why", "a")) == status
    in_words = OSError("a: why")  # as a checkpoint's, which names the whole one
    in_words.errno = number
    assert status_of(in_words) == status


def test_help_whose_reader_has_gone_ends_quietly():
    """As of `--help | head`: only a real pipe breaks."""
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "generate.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == -signal.SIGPIPE


def test_run_says_what_a_full_disk_says(capsys):
    """It is no refusal: the same command may succeed."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", "a/b")))
    assert ended.value.code == 70
    assert capsys.readouterr().err.endswith(": a/b: No space left on device\n")


def test_run_keeps_the_traceback_of_a_bug(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: {}["a"])
    assert ended.value.code == 70
    assert 'run(lambda: {}["a"])' in capsys.readouterr().err


def test_an_error_of_the_runtime_is_no_refusal():
    """It comes as a ValueError where a value is read."""
    assert status_of(ValueError("INTERNAL: a chip halted")) == 70
    assert status_of(ValueError("INTERNAL is no preset")) == 1


def test_a_script_fails_with_one_line_and_status_1(tmp_path):
    command = [sys.executable, SCRIPTS / "prepare_data.py", f"--input={tmp_path / 'absent'}", f"--out={tmp_path / 'o'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"prepare_data.py: {tmp_path / 'absent'}: no ")
    assert not done.stdout
    assert not (tmp_path / "o").exists()
