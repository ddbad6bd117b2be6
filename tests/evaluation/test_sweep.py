"""Grids that are stopped, that fail, that change: what is run, what is kept, what is refused."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.datasets import make_tokenizer
from support.fakes import Asked

from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.devices import Devices
from cepe_jax.directories import one_writer_in, staged_path
from cepe_jax.evaluation.readers.models import ModelConfig
from cepe_jax.evaluation.sweep import cells as store
from cepe_jax.evaluation.sweep import run as sweep
from cepe_jax.evaluation.sweep.cells import Cell
from cepe_jax.evaluation.sweep.grid import PerplexityRun, SweepConfig, TaskRun
from cepe_jax.evaluation.sweep.report import ReportConfig, report
from cepe_jax.evaluation.sweep.run import Event, measure_group, run_sweep
from cepe_jax.evaluation.tasks.evaluation import Point
from cepe_jax.evaluation.tasks.icl import Icl
from cepe_jax.evaluation.tasks.perplexity import Perplexity
from cepe_jax.evaluation.tasks.qa import Qa
from cepe_jax.evaluation.tasks.synthetic import Synthetic
from cepe_jax.identity import as_json
from cepe_jax.settings import decode
from cepe_jax.weights.source import load


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Six documents that are long enough, and a tokenizer."""
    texts = tmp_path_factory.mktemp("texts")
    make_tokenizer(texts)
    for number in range(6):
        letters = np.random.default_rng(number).choice(list("abcdefgh "), 90)
        (texts / f"{number}.txt").write_text("".join(letters))
    return texts


@pytest.fixture
def config(texts, tmp_path) -> SweepConfig:
    data = Perplexity(data=texts, chunks=(2, 0, 1), window=6, scored=3, chunk_length=4, kinds=("previous", "other"))
    models = {"first": ModelConfig(Path("a")), "second": ModelConfig(Path("b"))}
    return SweepConfig(out=tmp_path / "out", models=models, perplexity={"text": data})


CELLS = ["none.0", "previous.1", "other.1", "previous.2", "other.2"]
NAMES = [f"{model}.text.{cell}" for model in ("first", "second") for cell in CELLS]


class Died(BaseException):
    """What no process lives through."""


@dataclasses.dataclass
class Runs:
    """What ran: groups for which a process was started, models that were loaded, and cells, in order."""

    groups: list[list[str]] = dataclasses.field(default_factory=list)
    loaded: list[Path] = dataclasses.field(default_factory=list)
    cells: list[tuple] = dataclasses.field(default_factory=list)
    at: dict[tuple, Callable[[], None]] = dataclasses.field(default_factory=dict)  # what happens within a cell
    on_load: Callable[[ModelConfig], None] = lambda config: None
    faults: dict[Path, str] = dataclasses.field(default_factory=dict)  # of models, which their configs say

    def check(self, config: ModelConfig) -> None:
        if config.path in self.faults:
            raise ValueError(self.faults[config.path])


@pytest.fixture
def runs(texts, tmp_path, monkeypatch) -> Runs:
    """Processes are none: the parent does what they would do, and `Died` ends one. Models answer by a formula."""
    runs = Runs()

    def in_process(config: SweepConfig, group) -> Iterator[Event]:
        runs.groups.append([cell.name for cell in group])
        said, code = [], "with status 0"
        try:
            measure_group(config, group, said.append)
        except Died:
            code = sweep._end(-signal.SIGKILL)
        yield from [*said, Event("ended", message=code)]

    def load_model(config: ModelConfig) -> Asked:
        runs.on_load(config)
        runs.loaded.append(config.path)
        return Asked(Tokenizer(texts), gain=0.125 if config.path == Path("a") else 0.25)

    def measure(self, point: Point, model) -> Iterator[dict]:
        cell = (runs.loaded[-1].name, *point)
        runs.cells.append(cell)
        for number, record in enumerate(real(self, point, model)):
            if number == 2:
                runs.at.get(cell, lambda: None)()
            yield record

    real = Perplexity.measure
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sweep, "_in_process", in_process)
    monkeypatch.setattr(sweep, "load_model", load_model)
    monkeypatch.setattr(sweep, "check_model", runs.check)
    monkeypatch.setattr(Perplexity, "measure", measure)
    return runs


def raising(error: BaseException) -> Callable[[], None]:
    def act():
        raise error

    return act


def written(config: SweepConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (config.out / "cells").iterdir()}


def results(config: SweepConfig) -> dict:
    return json.loads((config.out / "results.json").read_text())


def test_a_grid(config, runs):
    """Each cell has both its files; little context comes first; a model is loaded once for its data."""
    run_sweep(config)
    assert runs.groups == [NAMES[:5], NAMES[5:]]
    assert runs.loaded == [Path("a"), Path("b")]
    files = written(config)
    assert set(files) == {f"{name}.{suffix}" for name in NAMES for suffix in ("json", "jsonl")}
    for name in NAMES:
        facts, records = json.loads(files[f"{name}.json"]), files[f"{name}.jsonl"].splitlines()
        assert (facts["schema"], facts["name"], facts["records"], len(records)) == (2, name, 6, 6)
        assert facts["identity"]["data.seed"] == 0
        assert facts["device"] == "1 x cpu"
        assert facts["seconds"] > 0
        assert 1e7 < facts["peak_memory"] < 1e11
        assert {"jax", "python", "commit", "date", "tokenizer", "packages"} <= facts.keys()
        assert facts["mesh"] == {"tensor": 1, "context": 0}
    assert [cell["name"] for cell in results(config)["cells"]] == NAMES
    assert results(config)["failures"] == []
    assert results(config)["config"]["perplexity"]["text"]["chunks"] == [2, 0, 1]
    assert results(config)["cells"][0]["metrics"]["nll"]["domains"] == {}  # there is but one


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not forget")
def test_peak_memory_is_that_of_the_cell(config, runs):
    """What an earlier one needed does not count."""
    runs.at["a", "previous", 1] = lambda: bytearray(b"x") * (300 << 20)
    run_sweep(config)
    peaks = [json.loads((config.out / "cells" / f"{name}.json").read_text())["peak_memory"] for name in NAMES[:3]]
    assert peaks[1] > peaks[0] + 2e8
    assert peaks[1] > peaks[2] + 2e8


def test_only_draws_depend_on_the_axis(config):
    def identity(family: type, *axis: int) -> dict:
        return Cell("m", "d", Point("", 0), ModelConfig(Path("a")), family(axis=axis, data=Path("d"))).identity

    assert identity(Qa, 0, 5) == identity(Qa, 0, 5, 50)
    assert identity(Icl, 0, 5) != identity(Icl, 0, 5, 50)


def test_what_is_finished_is_not_run_again(config, runs):
    run_sweep(config)
    before = written(config)
    runs.groups.clear()
    run_sweep(config)
    assert runs.groups == []
    longer = dataclasses.replace(config, models=config.models | {"third": ModelConfig(Path("c"))})
    run_sweep(longer)
    assert runs.groups == [[name.replace("first", "third") for name in NAMES[:5]]]
    assert before.items() <= written(config).items()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_grid_that_is_stopped_goes_on(config, runs, error):
    """The cell that was under way leaves nothing, and is run again with those after it."""
    runs.at["a", "other", 1] = raising(error)
    with pytest.raises(type(error)):
        run_sweep(config)
    before = written(config)
    assert set(before) == {f"{name}.{suffix}" for name in NAMES[:2] for suffix in ("json", "jsonl")}
    assert not (config.out / "results.json").exists()
    page = report(ReportConfig(config.out))
    assert "first.text.other.1`: not run yet" in page
    assert page.count("not run yet") == 8
    runs.at.clear()
    runs.groups.clear()
    run_sweep(config)
    assert runs.groups == [NAMES[2:5], NAMES[5:]]
    assert before.items() <= written(config).items()
    assert len(results(config)["cells"]) == 10


def test_a_cell_that_raises_stays_alone(config, runs, capsys):
    """It has no result, and is named; the others go on in the same process; the next run does it alone."""
    runs.at["a", "previous", 1] = raising(RuntimeError("RESOURCE_EXHAUSTED: no\n room"))
    with pytest.raises(ValueError, match=r"\b1 of 10 .* first\.text\.previous\.1: RuntimeError: RES"):
        run_sweep(config)
    assert len(runs.groups) == 2
    assert "first.text.previous.1 failed: RuntimeError: RESOURCE_EXHAUSTED: no room\n" in capsys.readouterr().err
    names = {path.partition(".json")[0] for path in written(config) if ".json" in path}
    assert names == {*NAMES} - {"first.text.previous.1"}
    (failure,) = results(config)["failures"]
    assert failure == {"name": "first.text.previous.1", "message": "RuntimeError: RESOURCE_EXHAUSTED: no room"}
    kept = json.loads((config.out / "cells" / "first.text.previous.1.failed").read_text())
    assert "raise error" in kept["traceback"]
    assert "Without a result: 1" in (config.out / "report.md").read_text()
    runs.at.clear()
    runs.groups.clear()
    run_sweep(config)
    assert runs.groups == [["first.text.previous.1"]]
    assert results(config)["failures"] == []
    assert not list(config.out.glob("cells/*.failed"))


def test_a_process_that_dies(config, runs):
    """Its cell has failed, and another process does the rest of the group."""
    runs.at["a", "other", 1] = raising(Died())
    with pytest.raises(ValueError, match=r"\b1 of 10 .* first\.text\.other\.1: .*kil"):
        run_sweep(config)
    assert runs.groups == [NAMES[:5], NAMES[3:5], NAMES[5:]]
    (failure,) = results(config)["failures"]
    assert failure["name"] == "first.text.other.1"
    assert "killed by SIGKILL" in failure["message"]
    assert "loaded" not in failure["message"]
    assert not list(config.out.glob("cells/first.text.other.1.json*"))


def test_a_model_that_does_not_load(config, runs):
    """All its cells fail, and the other model's do not; a process that dies of it is not started again."""
    runs.on_load = lambda config: raising(ValueError("no weights"))() if config.path == Path("a") else None
    with pytest.raises(ValueError, match="5 of 10 cells failed, .*: no weights; "):
        run_sweep(config)
    assert {failure["message"] for failure in results(config)["failures"]} == {"no weights"}
    runs.on_load = lambda config: raising(Died())()
    runs.groups.clear()
    with pytest.raises(ValueError, match="loaded .*killed by SIGKILL"):
        run_sweep(config)
    assert runs.groups == [NAMES[:5]]
    assert len(results(config)["cells"]) == 5


def test_a_mesh_that_cannot_be_made(config, runs):
    """Is what failed, in its own words; a process that ended by itself did not lack memory."""
    with pytest.raises(ValueError, match=r"10 of 10 cells failed, .*none\.0: (?!its process).*3"):
        run_sweep(dataclasses.replace(config, mesh=Devices(tensor=3)))
    assert runs.loaded == []
    assert sweep._end(1) == "with status 1"


def test_nothing_vanishes_from_the_report(config, runs):
    """A command that lacks a model or data of the same --out is refused before anything runs."""
    run_sweep(config)
    before, page = written(config), (config.out / "report.md").read_text()
    runs.groups.clear()
    for changes, lost in [
        ({"models": {"first": config.models["first"]}}, r"out has models\.second, .*lacks"),
        ({"perplexity": {"more": config.perplexity["text"]}}, r"out has perplexity\.text, .* --out"),
    ]:
        with pytest.raises(ValueError, match=lost):
            run_sweep(dataclasses.replace(config, **changes))
    assert (written(config), runs.groups, (config.out / "report.md").read_text()) == (before, [], page)


def test_one_command_at_a_time(config, runs):
    with one_writer_in(config.out), pytest.raises(ValueError, match=f"out .*process {os.getpid()} "):
        run_sweep(config)
    assert not runs.groups
    run_sweep(config)


def test_what_is_not_there(config, runs, tmp_path):
    """Is said before the first process."""
    (tmp_path / "empty.txt").touch()

    def asked(data: Path) -> dict:
        return {"perplexity": {"text": dataclasses.replace(config.perplexity["text"], data=data)}}

    def tasked(**changes) -> dict:
        return {"perplexity": {}, "tasks": {"nq": Synthetic(axis=(9,), samples=1, **changes)}}

    missing = {"perplexity": {}, "tasks": {"nq": Qa(axis=(1,), data=Path("nq"))}}
    no_tokenizer = {"models": {"x": ModelConfig(Path("a"), tokenizer=Path("tok"))}}
    for changes, said in [
        ({"models": {"x": ModelConfig(Path("absent"))}}, "^absent: no .*file"),
        ({"models": {"x": ModelConfig(Path("one/x"))}}, "^one/x: .*hf download one/x --local-dir x"),
        (no_tokenizer, "^tok: no .*file"),
        (asked(Path("absent")), "^absent: no .*file"),
        (asked(Path("empty.txt")), "^empty.txt is empty$"),
        (tasked(haystack=Path("hay.txt")), "^hay.txt: no .*file"),
        (missing, "^nq: no .*: put there "),
        (no_tokenizer | missing, "^tok: no .*; nq: no .*: put there "),
    ]:
        with pytest.raises(ValueError, match=said):
            run_sweep(dataclasses.replace(config, **changes))
    assert not runs.groups


def test_all_that_is_missing_is_said_at_once(config, runs):
    """Each model and each set once, whatever is wrong with it; a model that is of no use with its own reason."""
    models = {name: ModelConfig(Path(name)) for name in ("x", "y", "a")}
    data = {name: dataclasses.replace(config.perplexity["text"], data=Path(name)) for name in ("books", "code")}
    config = dataclasses.replace(config, models=models, perplexity=data)
    runs.faults[Path("a")] = "a is a plain decoder"
    absent = [f"{name}: no such file or directory" for name in ("x", "books", "code", "y")]
    with pytest.raises(ValueError, match=f"^{'; '.join([*absent, 'a is .*decoder'])}$"):
        run_sweep(config)
    assert not runs.groups


def test_a_model_that_cannot_be_read_so(config, runs):
    """No process is started for it, and the other model's cells are measured."""
    runs.faults[Path("a")] = "a is a plain decoder"
    with pytest.raises(ValueError, match=r"5 of 10 cells failed, first first\.text\.none\.0: a .*decoder;"):
        run_sweep(config)
    assert runs.groups == [NAMES[5:]]
    assert len(results(config)["cells"]) == 5


def test_one_set_that_is_not_there(config, runs):
    """Its cells have failed, without a process; the others run."""
    config = dataclasses.replace(config, tasks={"nq": Qa(axis=(1, 2), data=Path("nq"))})
    with pytest.raises(ValueError, match=r" first\.nq\.1: nq: no .*: put there "):
        run_sweep(config)
    assert not any(".nq." in cell for group in runs.groups for cell in group)
    found = results(config)
    assert {failure["name"] for failure in found["failures"]} == {
        f"{model}.nq.{value}" for model in config.models for value in (1, 2)
    }
    assert len(found["cells"]) == len([cell for group in runs.groups for cell in group]) > 0


def test_other_data_at_the_same_place_are_refused(config, runs, tmp_path):
    """By name, size or time of any file, but of those that a sweep itself writes there."""
    (tmp_path / "data").mkdir()
    for path in config.perplexity["text"].data.glob("*.txt"):
        shutil.copy(path, tmp_path / "data")
    text = dataclasses.replace(config.perplexity["text"], data=tmp_path / "data")
    config = dataclasses.replace(config, perplexity={"text": text})
    run_sweep(config)
    run_sweep(config)
    assert len(runs.groups) == 2
    some = tmp_path / "data" / "3.txt"
    times = some.stat().st_atime_ns, some.stat().st_mtime_ns
    os.utime(some, ns=(times[0], times[1] + 10**9))
    with pytest.raises(ValueError, match=r"data .*changed .*first\.text\.none\.0 .* --out"):
        run_sweep(config)
    os.utime(some, ns=times)
    run_sweep(config)
    (tmp_path / "data" / "more").mkdir()
    before = store.data_at(text, tmp_path / "data" / "more")
    (tmp_path / "data" / "more" / "more.txt").write_text("a")
    assert store.data_at(text, tmp_path / "data" / "more") == before
    with pytest.raises(ValueError, match="data .*changed"):
        run_sweep(config)
    assert len(runs.groups) == 2


def test_a_dataset_is_known_by_its_index(config, tmp_path):
    """Other times alone, of a copy, are no change."""
    (tmp_path / "dataset.json").write_text('{"splits": 1}')
    data = dataclasses.replace(config.perplexity["text"], data=tmp_path)
    before = store.data_at(data, config.out)
    os.utime(tmp_path / "dataset.json", ns=(0, 0))
    assert store.data_at(data, config.out) == before
    (tmp_path / "dataset.json").write_text('{"splits": 2}')
    assert store.data_at(data, config.out) != before
    assert store.data_at(dataclasses.replace(data, data=tmp_path / "absent"), config.out) is None


def test_other_settings_are_refused(config, runs):
    """Before anything is run, and the first setting is named; one that changes no record may change."""
    run_sweep(config)
    runs.groups.clear()
    before = written(config)

    def changed(**changes) -> SweepConfig:
        data = dataclasses.replace(config.perplexity["text"], **changes)
        return dataclasses.replace(config, perplexity={"text": data})

    for changes, said in [
        ({"seed": 1}, r"first\.text\.none\.0\.json: .*another run, data\.seed .* 0 .* 1 "),
        ({"chunks": (0, 1, 3)}, r"data\.chunks .* 2 .* 3 "),
        ({"scored": 2}, r"data\.scored .* 3 .* 2 "),
    ]:
        with pytest.raises(ValueError, match=said):
            run_sweep(changed(**changes))
    models = config.models | {"second": ModelConfig(Path("b"), window=9)}
    with pytest.raises(ValueError, match=r"second\.text\.none\.0\.json: .* model\.window .* null .* 9 "):
        run_sweep(dataclasses.replace(config, models=models))
    assert (written(config), runs.groups) == (before, [])
    run_sweep(changed(chunks=(2,), kinds=("other",)))
    assert runs.groups == []
    assert len(results(config)["cells"]) == 2


def test_other_weights_at_the_same_place_are_refused(config, runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hash.json").write_text('{"all": "one"}')
    config = dataclasses.replace(config, models={"first": ModelConfig(tmp_path / "model")})
    run_sweep(config)
    run_sweep(config)
    assert len(runs.groups) == 1
    (tmp_path / "model" / "hash.json").write_text('{"all": "two"}')
    with pytest.raises(ValueError, match=r"model .*other weights .* first\.text\.none\.0 "):
        run_sweep(config)
    assert len(runs.groups) == 1


@pytest.mark.parametrize(
    "damage", ["records gone", "a record less", "facts cut", "facts gone", "another number", "{}", "a fact less"]
)
def test_damaged_cells_are_run_again(config, runs, damage):
    """And no report has them before."""
    run_sweep(config)
    runs.groups.clear()
    before = written(config)
    facts, records = (config.out / "cells" / f"first.text.other.2.{suffix}" for suffix in ("json", "jsonl"))
    match damage:
        case "records gone":
            records.unlink()
        case "a record less":
            records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:-1]))
        case "facts cut":
            facts.write_bytes(facts.read_bytes()[:50])
        case "facts gone":
            facts.unlink()
        case "{}":
            facts.write_text("{}")
        case "a fact less":
            facts.write_text(facts.read_text().replace('"tokenizer"', '"tokens"'))
        case "another number":
            records.write_bytes(records.read_bytes().replace(b'"scored": 3', b'"scored": 4', 1))
    report(ReportConfig(config.out))
    assert [failure["name"] for failure in results(config)["failures"]] == ["first.text.other.2"]
    assert len(results(config)["cells"]) == 9
    run_sweep(config)
    assert runs.groups == [["first.text.other.2"]]
    assert len(results(config)["cells"]) == 10
    assert set(written(config)) == set(before)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "no record: .*data"),
        ([{"id": "a", "read": 1, "seconds": 1}] * 2, "two records .* a: "),
        ([{"id": "a"}], "lacks read, seconds"),
        ([{"id": "a", "read": 1, "seconds": float("nan")}], "not JSON compliant"),
    ],
)
def test_records_that_are_no_result(config, runs, monkeypatch, records, said):
    monkeypatch.setattr(Perplexity, "measure", lambda *asked: iter(records))
    with pytest.raises(ValueError, match=said):
        run_sweep(config)
    assert results(config)["cells"] == []
    assert {path.rpartition(".")[2] for path in written(config)} == {"failed"}


def test_what_a_killed_process_left_is_cleared(config, runs):
    (config.out / "cells").mkdir(parents=True)
    abandoned = staged_path(config.out / "cells" / "first.text.none.0.jsonl")
    abandoned.write_text("{")
    run_sweep(config)
    assert not abandoned.exists()


def test_tasks(config, runs, monkeypatch):
    """Their cells have no kind, and records may be scored by other metrics without a new run."""
    asked = []

    def measure(self, point: Point, model) -> Iterator[dict]:
        asked.append(point.value)
        for number in range(3):
            record = {"id": f"42:{number}", "seed": 42, "answers": ["yes"], "read": 10, "seconds": 0.5}
            yield record | {"prediction": "yes" if number < point.value else "no yes"}

    monkeypatch.setattr(Qa, "measure", measure)
    Path("x.jsonl").write_text("{}")
    task = Qa(axis=(2, 1), data=Path("x.jsonl"))
    config = dataclasses.replace(config, perplexity={}, tasks={"nq": task}, models={"m-1": ModelConfig(Path("a"))})
    run_sweep(config)
    assert asked == [1, 2]
    cells = results(config)["cells"]
    assert [cell["name"] for cell in cells] == ["m-1.nq.1", "m-1.nq.2"]
    np.testing.assert_allclose([cell["metrics"]["exact_match"]["mean"] for cell in cells], [1 / 3, 2 / 3])
    config = dataclasses.replace(config, tasks={"nq": dataclasses.replace(task, metrics=("substring_match",))})
    run_sweep(config)
    assert asked == [1, 2]
    assert [cell["metrics"].keys() for cell in results(config)["cells"]] == [{"substring_match"}] * 2
    assert [cell["metrics"]["substring_match"]["mean"] for cell in results(config)["cells"]] == [1, 1]
    assert cells[0]["protocol"]["max_new_tokens"] == 25
    run_sweep(dataclasses.replace(config, tasks={"nq": dataclasses.replace(task, axis=(1, 5))}))
    assert asked == [1, 2, 5]  # a longer axis changes no question


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {}}, "models, perplexity or tasks"),
        ({"perplexity": {}}, "models, perplexity or tasks"),
        ({"models": {"a.b": ModelConfig(Path("a"))}}, "'a.b' names"),
        ({"models": {"a/b": ModelConfig(Path("a"))}}, "'a/b' names"),
        ({"tasks": {"text": Qa(axis=(1,), data=Path("d"))}}, "text: .*perplexity and tasks"),
    ],
)
def test_bad_grids(config, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **changes)


def test_one_model_is_a_grid_of_one(config):
    run = {"model": {"path": "a"}, "out": str(config.out)}
    sweep = {"out": config.out, "models": {"model": ModelConfig(Path("a"))}}
    data = config.perplexity["text"]
    assert decode(PerplexityRun, run | as_json(data)) == SweepConfig(**sweep, perplexity={"perplexity": data})
    task = decode(TaskRun, run | {"family": "qa", "axis": [1], "data": "d", "passages": 3})
    assert task == SweepConfig(**sweep, tasks={"task": Qa(axis=(1,), data=Path("d"), passages=3)})
    with pytest.raises(ValueError, match="--model.path: required"):
        decode(PerplexityRun, {"out": "o"} | as_json(data))


def test_a_real_process_that_is_killed(home, texts, tmp_path, forward, monkeypatch):
    """CEPE in processes of its own, the first killed as it begins: the second cell is done by another, and its numbers
    are those of the model called directly.

    8 CPU-seconds for real workers: in the other tests the parent does what they would do.
    """
    sizes = {"window": 12, "scored": 5, "chunk_length": 8, "chunks": (0, 2)}
    data, started = {"perplexity": Perplexity(data=texts, **sizes)}, []
    run = SweepConfig(out=tmp_path / "out", models={"model": ModelConfig(home)}, perplexity=data)

    def killing(config: SweepConfig, group, real=sweep._in_process) -> Iterator[Event]:
        started.append([cell.point.value for cell in group])
        for event in real(config, group):
            if event == Event("begun", "model.perplexity.none.0"):  # it will compile for a second
                (child,) = multiprocessing.active_children()
                os.kill(child.pid, signal.SIGKILL)
            yield event

    monkeypatch.setattr(sweep, "_in_process", killing)
    with pytest.raises(ValueError, match=r"\b1 of 2 .*none.0: .*killed by SIGKILL"):
        run_sweep(run)
    assert started == [[0, 2], [2]]
    assert not multiprocessing.active_children()
    assert {path.split(".")[-2:][0] for path in written(run) if ".json" in path and path[0] != "."} == {"2"}
    tokenizer, model = Tokenizer(home), load(home)
    records = written(run)["model.perplexity.previous.2.jsonl"].splitlines()
    assert len(records) == 6
    for record in map(json.loads, records):
        ids, start = tokenizer.encode((texts / record["document"]).read_text()), int(record["id"].split(":")[1])
        tokens, context = np.array(ids[start : start + 12])[None], np.array(ids[start - 16 : start]).reshape(1, 2, 8)
        logits = np.asarray(forward(model, tokens, context), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(record["nll"], -log_probs[range(6, 11), tokens[0, 7:]].mean(), rtol=1e-5)
