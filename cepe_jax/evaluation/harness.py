"""Tasks of lm-evaluation-harness: results.json, and for each task the answers in samples_TASK.jsonl.

Requests that are longer than the window are cut and stand in cut.jsonl: no request ends the run.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.template import Template
from cepe_jax.devices import Devices, on_devices
from cepe_jax.directories import one_writer_in, write_json, write_text
from cepe_jax.evaluation.readers.models import ModelConfig, check_model, load_model
from cepe_jax.evaluation.sweep.cells import provenance, weights_of
from cepe_jax.identity import as_json, refuse_another_run
from cepe_jax.inference.overflow import Overflow
from cepe_jax.inference.text import CHUNK_LENGTH
from cepe_jax.parsing import parse_json, read_json

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

CUT = "cut.jsonl"  # in the directory of the results


@dataclass(frozen=True)
class HarnessConfig:
    model: ModelConfig  # the model, and who reads contexts
    tasks: tuple[str, ...]  # names of the harness' tasks
    out: Path  # gets the results; a question that is answered there is not asked again
    window: int  # tokens of a text and its answer that the decoder reads; what stands before is for the encoder
    overflow: Overflow = "truncate_left"  # how a longer text is cut
    chunk_length: int = CHUNK_LENGTH  # tokens that the encoder reads at once
    task_folder: Path | None = None  # a folder of further tasks, which the harness describes in YAML
    limit: int | None = None  # examples of each task; None: all
    num_fewshot: int | None = None  # demonstrations; None: as the task says
    lengths: tuple[int, ...] = ()  # tokens of the texts that RULER's tasks make
    chat: bool = False  # texts are messages, written by the chat template beside the tokenizer
    batch: int = 1  # answers that are written at once
    mesh: Devices = Devices()  # how devices share the model and the contexts

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("tasks is empty: name some of the harness', as --tasks=hellaswag")
        for name in ("window", "batch", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.model.reads == "replug":
            raise ValueError("model.reads is replug, which weights contexts by scores: a harness' texts bring none")
        if self.chat and self.overflow == "passages":
            raise ValueError("overflow is passages: what a chat template writes has none, take truncate_left or error")
        check_chunk_length(self.chunk_length)


def run_harness(config: HarnessConfig) -> None:
    """The results in `config.out`, as files and as a table on standard output."""
    _check(config)
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: the harness is an extra, pip install '.[harness]' in the checkout") from None

    facts = {"max_seq_lengths": list(config.lengths)} if config.lengths else {}
    facts["tokenizer"] = str(config.model.tokenizer or config.model.path)  # what RULER's tasks measure lengths with
    manager = TaskManager(include_path=config.task_folder and str(config.task_folder), metadata=facts)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"{name} is no task of lm-evaluation-harness: lm-eval ls tasks lists them")
    with one_writer_in(config.out):
        _claim(config)
        _ask(config, manager, facts)


def _ask(config: HarnessConfig, manager: "TaskManager", facts: dict) -> None:
    """Have the model answer, and write what the harness makes of it."""
    import lm_eval
    from lm_eval.utils import make_table

    from cepe_jax.evaluation.adapters import Adapter, Splitter

    with on_devices(config.mesh):
        model = load_model(config.model)
        template = Template(model.tokenizer) if config.chat else None
        splitter = Splitter(config.window, config.overflow, config.chunk_length)
        results = lm_eval.simple_evaluate(
            Adapter(model, splitter, template, config.batch, partial(_note_cut, config.out / CUT)),
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat,
            use_cache=str(config.out / "answers"),
            task_manager=manager,
            metadata=facts,
        )
    for task, samples in results.pop("samples").items():
        write_text(config.out / f"samples_{task}.jsonl", "".join(f"{json.dumps(s, default=str)}\n" for s in samples))
    cuts = _cuts(config.out / CUT)
    results["cepe_jax"] = {"config": as_json(config), "cut": cuts} | vars(provenance())
    write_json(config.out / "results.json", as_json(results))
    print(make_table(results))
    for task, count in cuts.items():
        print(f"{task}: {count} requests were cut to the window of {config.window}, see {config.out / CUT}")


def _check(config: HarnessConfig) -> None:
    """ValueError for what the model's config and the task folder rule out; no weight is read."""
    window = check_model(config.model).window
    if window is not None and config.window > window:
        raise ValueError(f"window is {config.window} and {config.model.path} reads {window} tokens: lower one of them")
    if config.task_folder is not None and not config.task_folder.is_dir():
        raise NotADirectoryError(f"{config.task_folder}: no such directory of tasks")


class Cut(TypedDict):
    """A line about a request that is cut, as far as it is read."""

    task: str


def _note_cut(path: Path, request: "Instance", why: str) -> None:
    """A line at `path` says which request is cut, and why."""
    cut = {"task": request.task_name, "document": request.doc_id, "request": request.idx, "why": why}
    with open(path, "a") as file:
        file.write(f"{json.dumps(cut)}\n")


def _cuts(path: Path) -> dict[str, int]:
    """Return how many requests of each task were cut, in this run and the earlier ones that it resumes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(
        Counter(parse_json(line, str(path), Cut)["task"] for line in dict.fromkeys(lines))
    )  # cut twice: stopped in between


def _claim(config: HarnessConfig) -> None:
    """`config.out` has answers of this model to these tasks alone; ValueError where it has others."""
    path, ours = config.out / "config.json", as_json(config) | {"weights": weights_of(config.model)}
    for pace in ("out", "mesh", "batch"):  # no answer depends on them
        del ours[pace]
    if path.exists():
        refuse_another_run(config.out, read_json(path), ours)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(path, ours)
