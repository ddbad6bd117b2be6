"""The words of a run while it trains: a status line, `metrics.jsonl`, TensorBoard events; its speed and memory."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from cepe_jax.devices import peak_memory
from cepe_jax.directories import is_remote, write_text
from cepe_jax.distributed import is_first


@dataclass(frozen=True)
class StepFacts:
    """The facts of a step that are known before it runs."""

    learning_rates: Sequence[float]  # of every step
    tokens: int  # of all its sequences, contexts too
    flops: float  # model FLOPs, see cost.py
    peak_flops: float | None = None  # per second, of all devices together; None where the chip's is not known


class Log:
    """`metrics.jsonl` and `tensorboard/` in `out`; what a run that was cut off wrote there of steps after `first` goes.

    Of many processes the first writes. In a bucket there is no `tensorboard/`. Speeds are of the steps since the last
    entry. They leave out the first step of a run, which is compiled, and what happens before `rest`.
    """

    def __init__(self, out: Path | epath.Path, first: int, facts: StepFacts):
        self.facts, self.latest, self._evaluated = facts, "", ""
        self._path, self._events, self._since = out / "metrics.jsonl", None, None
        self._writes = is_first()
        if self._writes:
            self._text = lines_until(first, self._path) if self._path.exists() else ""
            write_text(self._path, self._text)
        if self._writes and not is_remote(out):
            from tensorboardX import SummaryWriter  # here: where torch is installed, this imports it

            # A file of each start, though two were in one second; what earlier ones have after `first` is taken back.
            self._events = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1, filename_suffix=f".{first}")

    def rest(self, step: int) -> None:
        """Speeds begin anew after `step`, which is done."""
        self._since = step, time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """An entry for `step`, which has just been done."""
        values = metrics | {"learning_rate": float(self.facts.learning_rates[step - 1])}
        shown = [f"loss {metrics['loss']:.3f}"]
        if self._since is not None and step > self._since[0]:
            seconds = (time.monotonic() - self._since[1]) / (step - self._since[0])
            values |= {"seconds_per_step": seconds, "tokens_per_second": self.facts.tokens / seconds}
            shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
            if self.facts.peak_flops is not None:
                values["mfu"] = self.facts.flops / (seconds * self.facts.peak_flops)
                shown.append(f"MFU {values['mfu']:.1%}")
        values["peak_memory"] = peak_memory()
        self.latest = ", ".join([*shown, f"{values['peak_memory'] / 1e9:.2f} GB"]) + self._evaluated
        self.rest(step)
        self.record(step, values)

    def write_evaluation(self, step: int, terms: dict[str, float]) -> None:
        """An entry for what the model of after `step`, which is done, was evaluated to; speeds leave it out."""
        self._evaluated = f", eval loss {terms['loss']:.3f} at step {step}"
        self.record(step, {f"eval_{name}": value for name, value in terms.items()})
        self.rest(step)

    def record(self, step: int, values: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, and as much in TensorBoard."""
        if not self._writes:
            return
        line = json.dumps({"step": step} | values) + "\n"
        if is_remote(self._path):
            self._text += line
            self._path.write_text(self._text)
            return
        with open(self._path, "a") as file:
            file.write(line)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def lines_until(step: int, path: Path | epath.Path) -> str:
    """The entries of `step` and before, without a last line that was cut off; ValueError for a line that is none."""
    kept = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no JSON ({error}): mend or remove the line") from None
        if entry["step"] <= step:
            kept.append(line)
    return "".join(kept)
