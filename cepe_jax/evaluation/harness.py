"""Tasks of lm-evaluation-harness: results.json, and for each task the answers in samples_TASK.jsonl."""

import json
from dataclasses import dataclass
from pathlib import Path

from cepe_jax.checks import check_chunk_length
from cepe_jax.directories import refuse_another_run, staged_path
from cepe_jax.evaluation.cells import plain, provenance, weights_at
from cepe_jax.evaluation.models import ModelConfig, load_model
from cepe_jax.inference.overflow import Overflow
from cepe_jax.inference.template import Template
from cepe_jax.inference.terminal import Devices, on_devices
from cepe_jax.inference.text import CHUNK_LENGTH


@dataclass(frozen=True)
class HarnessConfig:
    model: ModelConfig
    tasks: tuple[str, ...]  # names of the harness' tasks
    out: Path  # gets the results; what is answered there already is not asked again
    window: int  # tokens of a text and its answer that the decoder reads; what stands before is for the encoder
    overflow: Overflow = "truncate_left"  # how a longer text is cut
    chunk_length: int = CHUNK_LENGTH  # tokens
    task_folder: Path | None = None  # of further tasks, as the harness describes them in YAML
    limit: int | None = None  # examples of each task; None: all
    num_fewshot: int | None = None  # demonstrations; None: as the task says
    lengths: tuple[int, ...] = ()  # of the texts that RULER's tasks make, in tokens
    chat: bool = False  # texts are messages, written by the chat template beside the tokenizer
    batch: int = 1  # answers that are written at once
    mesh: Devices = Devices()

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
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: the harness is an extra, pip install '.[harness]'") from None
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from cepe_jax.evaluation.adapters import Adapter, Splitter

    facts = {"max_seq_lengths": list(config.lengths)} if config.lengths else {}
    facts["tokenizer"] = str(config.model.tokenizer or config.model.path)  # what RULER's tasks measure lengths with
    manager = TaskManager(include_path=config.task_folder and str(config.task_folder), metadata=facts)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"{name} is no task of lm-evaluation-harness: lm-eval ls tasks lists them")
    _claim(config)
    with on_devices(config.mesh):
        model = load_model(config.model)
        template = Template(model.tokenizer) if config.chat else None
        found = lm_eval.simple_evaluate(
            Adapter(model, Splitter(config.window, config.overflow, config.chunk_length), template, config.batch),
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat,
            use_cache=str(config.out / "answers"),
            task_manager=manager,
            metadata=facts,
        )
    for task, samples in found.pop("samples").items():
        _write(config.out / f"samples_{task}.jsonl", "".join(f"{json.dumps(s, default=str)}\n" for s in samples))
    found["cepe_jax"] = {"config": plain(config)} | provenance()
    _write(config.out / "results.json", json.dumps(found, indent=1, default=str))
    print(make_table(found))


def _claim(config: HarnessConfig) -> None:
    """`config.out` has answers of this model to these tasks alone; ValueError where it has others."""
    path, ours = config.out / "config.json", plain(config) | {"weights": weights_at(config.model.path)}
    for pace in ("out", "mesh", "batch"):  # no answer depends on them
        del ours[pace]
    if path.exists():
        refuse_another_run(config.out, json.loads(path.read_text()), ours)
    config.out.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(ours, indent=1))


def _write(path: Path, text: str) -> None:
    staged = staged_path(path)
    staged.write_text(text)
    staged.rename(path)
