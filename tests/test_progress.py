"""What `track` says where there is no terminal, and how it counts."""

import io

import pytest
import rich.console

from cepe_jax import progress
from cepe_jax.progress import show_notices, track


def test_the_items_come_and_a_line_at_the_end(caplog):
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert caplog.messages == ["letters: 3 of 3, 0 s "]


def test_amounts_are_summed(caplog):
    """Of the total in the same unit; an item counts once it is done."""
    seen = []
    items = track(iter([1000.5, 500.0]), "bytes", 1500.5, lambda: f"status {len(seen)}", amount=lambda size: size)
    for item in items:
        seen.append(item)
    assert caplog.messages == ["bytes: 1,500 of 1,500, 0 s status 2"]


def test_without_a_total(caplog):
    assert list(track((n for n in range(4)), "numbers", amount=lambda n: n)) == [0, 1, 2, 3]
    assert caplog.messages == ["numbers: 6, 0 s "]


@pytest.mark.parametrize(("amounts", "lines"), [([2, 3, 5], ["2 of 10", "5 of 10", "10 of 10"]), ([], ["0 of 10"])])
def test_a_line_every_so_often(caplog, monkeypatch, amounts, lines):
    """And the last one once."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    list(track(amounts, "work", 10, amount=float))
    assert caplog.messages == [f"work: {line}, 0 s " for line in lines]


def test_lines_are_seconds_apart(caplog, monkeypatch):
    clock = iter([0.0, 4.0, 9.9, 10.0, 10.0, 10.0, 19.0, 19.0])  # the start; each item; a line asks twice more
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    list(track(range(4), "work"))
    assert caplog.messages == ["work: 3 of 4, 10 s ", "work: 4 of 4, 19 s "]


def test_notices_of_a_script_are_on_stderr(capsys):
    """Once, however often a script asks for them."""
    for _ in range(2):
        show_notices()
    list(track("ab", "letters"))
    assert capsys.readouterr() == ("", "letters: 2 of 2, 0 s \n")


def test_the_bar_of_a_terminal_counts_amounts(monkeypatch):
    written, console = io.StringIO(), rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda stderr: console(file=written, force_terminal=True, width=120, color_system=None)
    )
    assert list(track([300, 1200], "bytes", 1500, lambda: "well", amount=lambda size: size)) == [300, 1200]
    (last,) = [line for line in written.getvalue().splitlines()[-2:] if "bytes" in line]
    assert "100%" in last
    assert "1,500 well" in last
