"""The gain from contexts over runs that differ by their seed: sentences, a table, a plot, and one text continued."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cepe_jax.directories import write_json, write_text
from cepe_jax.evaluation.sweep.estimates import Estimate
from cepe_jax.evaluation.sweep.plots import ERRORS, save_figure
from cepe_jax.evaluation.sweep.results import Result, gather
from cepe_jax.evaluation.sweep.tables import number
from cepe_jax.evaluation.tasks.perplexity import Perplexity, iter_windows

KINDS = {"previous": "its own", "other": "another document's", "retrieved": "retrieved"}


@dataclass(frozen=True)
class GainsConfig:
    runs: tuple[Path, ...]  # the --out of perplexity evaluations of the same windows, one of each seed
    trained: int  # contexts that the model learned to read
    out: Path  # gets gains.md, gains.json and gains.png
    new_tokens: int = 32  # tokens of the continued text

    def __post_init__(self):
        if not self.runs or self.trained < 1 or self.new_tokens < 1:
            raise ValueError("runs, trained and new_tokens: give a directory or more, and numbers above 0")


@dataclass(frozen=True)
class Gain:
    """The gain in nll, nats per token, over no context: windows are averaged over runs, documents are independent."""

    estimate: Estimate
    spread: float | None  # standard deviation of the runs' means; None of one run
    windows: dict[str, float]


class Runs:
    """The results of the runs, checked to be of the same windows and contexts."""

    def __init__(self, config: GainsConfig):
        sweeps = [gather(path) for path in config.runs]
        self.rows = [{kind: row for (_, kind), row in each.rows("perplexity").items()} for each in sweeps]
        for path, each in zip(config.runs, sweeps, strict=True):
            if len(each.config.models) > 1 or each.config.evaluations.keys() != {"perplexity"}:
                raise ValueError(f"{path} is of several models or data: give the --out of evaluate.py perplexity")
        for path, each, rows in zip(config.runs, sweeps, self.rows, strict=True):
            if each.missing:
                raise ValueError(f"{path}: {len(each.missing)} results are missing: run its evaluation again")
            if {kind: row.keys() for kind, row in rows.items()} != {
                kind: row.keys() for kind, row in self.rows[0].items()
            }:
                raise ValueError(f"{path} has other kinds or chunks than {config.runs[0]}: compare runs of one config")
            if 0 not in next(iter(rows.values()), {}):
                raise ValueError(f"{path} was measured without 0 in chunks: there is nothing to gain over")
            if self.without(rows).values["nll"].keys() != self.without(self.rows[0]).values["nll"].keys():
                raise ValueError(f"{path} has other windows than {config.runs[0]}: compare runs on the same data")
        some = next(iter(sweeps[0].finished.values())).cell
        self.data: Perplexity = sweeps[0].config.perplexity["perplexity"]
        self.model = some.model_config

    @staticmethod
    def without(rows: dict[str, dict[int, Result]]) -> Result:
        return next(iter(rows.values()))[0]

    @cached_property
    def nll(self) -> Estimate:
        """Without a context."""
        return self._mean([self.without(rows).values["nll"] for rows in self.rows])

    @cached_property
    def gains(self) -> dict[str, dict[int, Gain]]:
        """By kind and number of contexts."""
        return {
            kind: {contexts: self._gain(kind, contexts) for contexts in sorted(row) if contexts}
            for kind, row in self.rows[0].items()
        }

    def _gain(self, kind: str, contexts: int) -> Gain:
        runs = []
        for rows in self.rows:
            before, after = self.without(rows).values["nll"], rows[kind][contexts].values["nll"]
            runs.append({name: before[name] - after[name] for name in before})
        means = [np.mean(list(run.values())) for run in runs]
        windows = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        return Gain(self._mean(runs), float(np.std(means, ddof=1)) if len(runs) > 1 else None, windows)

    def _mean(self, runs: Sequence[dict[str, float]]) -> Estimate:
        groups = self.without(self.rows[0]).groups
        return Estimate.of([np.mean([run[name] for run in runs]) for name in groups], list(groups.values()))


def gains(config: GainsConfig) -> str:
    """The page of gains.md, which is in `config.out` with the plot and the numbers as JSON."""
    runs = Runs(config)
    if missing := {kind for kind in runs.gains if config.trained not in runs.gains[kind]}:
        raise ValueError(
            f"trained is {config.trained}: chunks of {', '.join(sorted(missing))} has no such number: give one of them"
        )
    page = "\n".join([*sentences(runs, config.trained), "", *table(runs), "", *continued(runs, config)]) + "\n"
    config.out.mkdir(parents=True, exist_ok=True)
    _plot(runs, config)
    numbers = {
        kind: {contexts: {"gain": asdict(gain.estimate), "spread": gain.spread} for contexts, gain in row.items()}
        for kind, row in runs.gains.items()
    }
    without = {"nll": asdict(runs.nll)}
    write_json(config.out / "gains.json", {"runs": len(runs.rows), "without": without} | numbers)
    write_text(config.out / "gains.md", page)
    return page


def sentences(runs: Runs, trained: int) -> Iterator[str]:
    """Yield the gains in words, a line each."""
    data, documents = runs.data, runs.nll.groups
    seeds = f", mean of {len(runs.rows)} seeds" if len(runs.rows) > 1 else ""
    yield (
        f"Without a context the decoder finds {data.scored} tokens of each of {documents} held-out documents at "
        f"{runs.nll.mean:.3f} nats a token{seeds}."
    )
    for kind, row in runs.gains.items():
        for contexts in (trained, 4 * trained) if kind == "previous" else (trained,):
            if contexts in row:
                gain = row[contexts].estimate
                does, more = ("saves", "more") if gain.mean > 0 else ("costs", "less")
                error = "" if gain.stderr is None else f" ± {gain.stderr:.3f}"
                yield (
                    f"With {contexts * data.chunk_length:,} tokens of {KINDS[kind]} context it {does} "
                    f"{abs(gain.mean):.3f}{error}: the right token is {abs(math.expm1(gain.mean)):.1%} {more} likely."
                )


def table(runs: Runs) -> Iterator[str]:
    several = len(runs.rows) > 1
    yield "| contexts | " + " | ".join(f"gain from {KINDS[kind]}" for kind in runs.gains) + " |"
    yield "|---|" + "---|" * len(runs.gains)
    for contexts in next(iter(runs.gains.values())):
        cells = [row[contexts] for row in runs.gains.values()]
        written = [number(gain.estimate, Perplexity.unit, "+") for gain in cells]
        if several:
            written = [f"{text} (seeds: {gain.spread:.4f})" for text, gain in zip(written, cells, strict=True)]
        yield f"| {contexts} | {' | '.join(written)} |"


def continued(runs: Runs, config: GainsConfig) -> Iterator[str]:
    """One window continued by the first run's model, with its context and without: that of the greatest gain."""
    from cepe_jax.inference.text import load

    if "previous" not in runs.gains:
        return
    gained = runs.gains["previous"][config.trained].windows
    name = max(gained, key=gained.get)
    model = load(runs.model.path)
    window = next(w for w in iter_windows(runs.data, model.tokenizer) if f"{w.document}:{w.start}" == name)
    contexts = [chunk.tolist() for chunk in window.contexts["previous"][-config.trained :]]
    context = model.encode(contexts, chunk_length=runs.data.chunk_length)
    cut = runs.data.window - runs.data.scored
    prompt, truth = model.tokenizer.decode(window.tokens[:cut].tolist()), window.tokens[cut:].tolist()
    length = {"max_new_tokens": config.new_tokens}
    texts = {
        "with its context": model.generate(prompt, context, **length),
        "without": model.generate(prompt, **length),
        "the document": model.tokenizer.decode(truth[: config.new_tokens]),
    }
    start = window.start + cut
    yield f"`{window.document}` from token {start:,}, the window of the greatest gain, {gained[name]:+.3f}:"
    yield from ("", "| | |", "|---|---|", f"| it ends with | {_cell(prompt[-100:])} |")
    yield from (f"| {how} | {_cell(text)} |" for how, text in texts.items())


def _cell(text: str) -> str:
    """The text as code in a cell of a table, in one line."""
    for old, new in (("\n", "\\n"), ("|", "\\|"), ("`", "'")):
        text = text.replace(old, new)
    return f"`{text}`"


def _plot(runs: Runs, config: GainsConfig) -> None:
    with save_figure(config.out / "gains.png", figsize=(5.4, 3.8)) as panel:
        for kind, row in runs.gains.items():
            tokens = [contexts * runs.data.chunk_length for contexts in row]
            means = [gain.estimate.mean for gain in row.values()]
            bars = [ERRORS * (gain.estimate.stderr or 0.0) for gain in row.values()]
            panel.errorbar(tokens, means, yerr=bars, marker="o", capsize=3, label=f"{KINDS[kind]} context")
        panel.axhline(0, color="grey", linewidth=0.8)
        trained = config.trained * runs.data.chunk_length
        panel.axvline(trained, color="grey", linestyle=":", label="tokens of context in training")
        panel.set(xlabel="tokens of context", ylabel="gain, nats per token", xscale="log")
        panel.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=45)
        panel.minorticks_off()
        panel.legend(
            frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
        )  # above: bars reach the corners
