"""The report of what contexts buy: report.json, report.md and perplexity.png."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from cepe_jax.checks import check_chunk_length
from cepe_jax.data.corpus import Corpus
from cepe_jax.data.examples import chunks_before
from cepe_jax.evaluation.perplexity import Window, choose_windows, context_nll
from cepe_jax.inference.context import encode_chunks
from cepe_jax.inference.generate import generate
from cepe_jax.model.cepe import Cepe, flat_mask
from cepe_jax.weights.huggingface import load

KINDS = {"previous": "the document's own text before the window", "other": "another document's text"}


@dataclass(frozen=True)
class EvaluateConfig:
    model: Path
    data: Path  # a prepared dataset; its test split is read
    out: Path  # gets report.json, report.md, perplexity.png
    window: int  # tokens the decoder reads
    scored: int  # of these, the last ones whose nll counts
    chunk_length: int  # tokens
    trained_chunks: int  # the most chunks seen in training; one of `chunks`
    chunks: tuple[int, ...]  # numbers of context chunks
    sample_tokens: int = 48  # generated after half a window, with and without context
    seconds: Path | None = None  # lines "stage seconds" of what came before

    def __post_init__(self):
        if min(self.chunks, default=0) < 1 or len(set(self.chunks)) < len(self.chunks):
            raise ValueError(f"chunks is {list(self.chunks)}: give different numbers above 0; none is always measured")
        check_chunk_length(self.chunk_length)
        if self.trained_chunks not in self.chunks:
            raise ValueError(f"trained_chunks {self.trained_chunks} is not among chunks {list(self.chunks)}: add it")
        if not 0 < self.scored <= self.window:
            raise ValueError(f"scored is {self.scored}: give 1 to the window's {self.window} tokens")


def _mean(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "stderr": float(values.std(ddof=1) / np.sqrt(len(values)))}


def _row(kind: str, chunks: int, nll: np.ndarray, without: np.ndarray) -> dict:
    nlls, gain = _mean(nll), _mean(without - nll)
    return {
        "chunks": chunks,
        "context": kind,
        "nll": nlls["mean"],
        "nll_stderr": nlls["stderr"],
        "gain": gain["mean"],
        "gain_stderr": gain["stderr"],
        "documents": len(nll),
    }


def _places(window: Window, config: EvaluateConfig) -> dict:
    def spans(end: int) -> dict[str, list[int]]:
        return {str(count): [end - count * config.chunk_length, end] for count in config.chunks}

    return {
        "file": window.document.name,
        "start": window.start,
        "end": window.start + config.window,
        "previous": spans(window.start),
        "other": {"file": window.other.name} | spans(window.other_end),
    }


def _sample(model: Cepe, window: Window, config: EvaluateConfig, tokenizer) -> dict[str, str]:
    """What the model writes after the first half of a window, greedily, with and without the document's context."""
    prompt = window.document.tokens[window.start : window.start + config.window // 2]
    before = chunks_before(window.document.tokens, window.start, config.trained_chunks, config.chunk_length)
    context, mask = before["context"][None], before["context_mask"][None]
    memory = encode_chunks(model, context, mask), flat_mask(mask)
    limits = {"max_new_tokens": config.sample_tokens, "stop_ids": [tokenizer.eos_id]}
    (without,), (with_context,) = generate(model, [prompt], **limits), generate(model, [prompt], *memory, **limits)
    truth = window.document.tokens[window.start + len(prompt) :][: config.sample_tokens]
    texts = {"prompt": prompt, "document": truth, "without context": without, "with context": with_context}
    return {"file": window.document.name} | {name: tokenizer.decode(ids) for name, ids in texts.items()}


def evaluate(config: EvaluateConfig) -> None:
    """The three files of the report in `config.out`, report.json last."""
    begun = time.monotonic()
    corpus = Corpus(config.data, "test")
    model = load(config.model)
    if not isinstance(model, Cepe):
        raise ValueError(f"{config.model}: is no CEPE model: give one that was warmed up or trained")
    corpus.tokenizer.check_is_of(config.model)
    windows = choose_windows(corpus, config.window, max(config.chunks) * config.chunk_length)
    nll = context_nll(model, windows, config.window, config.scored, list(config.chunks), config.chunk_length)
    without = nll["none", 0]
    report = {
        "rows": [_row(kind, chunks, values, without) for (kind, chunks), values in nll.items()],
        "gain": {kind: _mean(without - nll[kind, config.trained_chunks]) for kind in KINDS},
        "trained_chunks": config.trained_chunks,
        "windows": [_places(window, config) for window in windows],
        "sample": _sample(model, windows[0], config, corpus.tokenizer),
        "device": jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
    }
    report["seconds"] = _read_seconds(config.seconds) | {"evaluate": round(time.monotonic() - begun, 1)}
    config.out.mkdir(parents=True, exist_ok=True)
    _plot(report, config.out / "perplexity.png")
    (config.out / "report.md").write_text(markdown(report))
    staged = config.out / "report.json.tmp"
    staged.write_text(json.dumps(report, indent=1, default=str))
    staged.rename(config.out / "report.json")
    print(markdown(report))


def _read_seconds(path: Path | None) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for line in path.read_text().splitlines() if path else []:
        stage, value = line.split()
        seconds[stage] = seconds.get(stage, 0.0) + float(value)
    return seconds


def markdown(report: dict) -> str:
    """The report as tables for people."""
    lines = [
        f"nll of the last {report['config']['scored']} of {report['config']['window']} tokens of "
        f"{len(report['windows'])} held-out documents, in nats per token; gain over no context, paired by document.",
        "",
        "| chunks | context | nll | gain |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        gain = f"{row['gain']:+.4f} ± {row['gain_stderr']:.4f}" if row["chunks"] else ""
        beyond = " (more than in training)" if row["chunks"] > report["trained_chunks"] else ""
        lines.append(f"| {row['chunks']}{beyond} | {row['context']} | {row['nll']:.4f} | {gain} |")
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {seconds:.0f} |" for stage, seconds in report["seconds"].items()]
    lines.append(f"| all | {sum(report['seconds'].values()):.0f} |")
    sample = dict(report["sample"])
    lines += ["", f"A greedy sample, from `{sample.pop('file')}`:"]
    for name, text in sample.items():
        lines += ["", f"{name}:", "```", text.replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    (none,) = (row for row in report["rows"] if row["context"] == "none")
    for kind, meaning in KINDS.items():
        rows = [row for row in report["rows"] if row["context"] == kind]
        points = [(0, 0.0, 0.0)] + [(row["chunks"], row["gain"], row["gain_stderr"]) for row in rows]
        chunks, gain, error = map(np.array, zip(*points, strict=True))
        axes.errorbar(chunks, none["nll"] - gain, yerr=2 * error, marker="o", capsize=3, label=meaning)
    axes.axvline(report["trained_chunks"], color="grey", linestyle=":", label="chunks in training")
    axes.set(xlabel="context chunks (bars: 2 standard errors of the gain)", ylabel="nll, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
