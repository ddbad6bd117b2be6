"""The overlap of a model's continuations with a corpus: the share of their n-grams that occur in it.

This is not tracing: that an n-gram occurs does not say that the model has it from there. The true continuations of
held-out documents, and their words in random order, show how much of an overlap the language alone makes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cepe_jax.config import Dtype
from cepe_jax.data.corpus import Corpus
from cepe_jax.directories import one_writer_in, write_json, write_text
from cepe_jax.evaluation.sweep.estimates import Estimate
from cepe_jax.evaluation.sweep.plots import save_figure
from cepe_jax.identity import as_json
from cepe_jax.inference.generate import Sampling, generate
from cepe_jax.inference.text import TextModel, load
from cepe_jax.parsing import Seed
from cepe_jax.progress import track
from cepe_jax.tracing.index import Index
from cepe_jax.tracing.words import ngrams, words_of

TRUE, SHUFFLED = "held-out documents", "their words in random order"


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    model: Path  # a decoder or a CEPE, in any format; a CEPE reads no context
    index: Path  # the index of a corpus
    data: Path  # a dataset of documents with the index's tokenizer
    out: Path  # gets overlap.json, report.md and report.png
    split: str = "test"  # split of the documents whose beginnings are continued, which the index has not counted
    documents: int = 100  # documents that are drawn
    prompt_tokens: int = 64  # tokens of a document's beginning, BOS first
    new_tokens: int = 64  # tokens of a continuation
    temperatures: tuple[float, ...] = (0.0, 1.0)  # of the draws of continuations; 0: the most probable tokens
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10)  # words of the n-grams
    batch_size: int = 16  # documents at once
    dtype: Dtype = "float32"  # type of weights and activations
    seed: Seed = 0  # draws documents and tokens

    def __post_init__(self):
        for name in ("documents", "prompt_tokens", "new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths is {list(self.lengths)}: give numbers of words above 0")
        for temperature in self.temperatures:
            Sampling(temperature)


def draw(corpus: Corpus, config: OverlapConfig) -> Iterator[np.ndarray]:
    """Yield the first tokens of documents that have enough for a prompt and a continuation, without EOS."""
    count = 0
    for number in np.random.default_rng(config.seed).permutation(len(corpus)):
        if count == config.documents:
            return
        tokens = corpus[int(number)].tokens
        if len(tokens) > config.prompt_tokens + config.new_tokens:
            count += 1
            yield tokens[: config.prompt_tokens + config.new_tokens]
    if not count:
        wanted = f"{config.prompt_tokens} + {config.new_tokens} tokens"
        raise ValueError(f"no document of {config.data}, split {config.split}, has more than {wanted}: lower them")


def continuations(model: TextModel, prompts: Sequence[list[int]], temperature: float, config: OverlapConfig):
    """Return the ids that the model writes after each prompt; it is not stopped before `new_tokens`."""
    written = []
    for at in track(range(0, len(prompts), config.batch_size), f"write at temperature {temperature}, batches"):
        rows = prompts[at : at + config.batch_size]
        draws = [Sampling(temperature, seed=config.seed + at + row) for row in range(len(rows))]
        limits = {"max_new_tokens": config.new_tokens, "policy": model.cache}
        written += generate(model.model, rows, sampling=draws, **limits)
    return written


def shares(index: Index, texts: Sequence[list[str]], lengths: Sequence[int]) -> dict[int, Estimate]:
    """Return the share of the texts' n-grams that occur in the corpus, by n; those of one text are dependent."""
    measured = {}
    for n in lengths:
        owners = [(ngram, str(number)) for number, words in enumerate(texts) for ngram in ngrams(words, n)]
        if owners:
            occurs = index.counts([ngram for ngram, _ in owners]) > 0
            measured[n] = Estimate.of(occurs.astype(float), [owner for _, owner in owners])
    return measured


def overlap(config: OverlapConfig) -> None:
    """Write the overlap of a model's continuations with a corpus to `config.out`, and print the report."""
    index, corpus = Index(config.index), Corpus(config.data, config.split)
    index.check_tokenizer(corpus.tokenizer.fingerprint(), config.data)
    if corpus.records.digest in index.facts["records"].values():
        raise ValueError(f"{config.index} has counted split {config.split} of {config.data}: give a held-out split")
    with one_writer_in(config.out):
        model = load(config.model, config.dtype)
        index.check_tokenizer(model.tokenizer.fingerprint(), config.model)
        rows = list(draw(corpus, config))
        prompts = [row[: config.prompt_tokens].tolist() for row in rows]
        texts = {TRUE: [words_of(corpus.tokenizer.decode(row[config.prompt_tokens :])) for row in rows]}
        rng = np.random.default_rng(config.seed)
        texts[SHUFFLED] = [rng.permutation(words).tolist() for words in texts[TRUE]]
        for temperature in config.temperatures:
            written = continuations(model, prompts, temperature, config)
            texts[f"the model, temperature {temperature:g}"] = [
                words_of(model.tokenizer.decode(ids)) for ids in written
            ]
        measured = {name: shares(index, of_name, config.lengths) for name, of_name in texts.items()}
        stored = {name: {n: vars(one) for n, one in of_name.items()} for name, of_name in measured.items()}
        write_json(config.out / "overlap.json", {"config": as_json(config), "shares": stored})
        with save_figure(config.out / "report.png", figsize=(6.4, 4.2)) as panel:
            for name, of_name in measured.items():
                errors = [2 * (one.stderr or 0) for one in of_name.values()]
                means = [one.mean for one in of_name.values()]
                panel.errorbar(list(of_name), means, yerr=errors, marker="o", capsize=3, label=name)
            panel.set(xlabel="words of an n-gram", ylabel="share that occurs in the corpus", ylim=(0, 1.02))
            panel.legend(frameon=False)
        text = report(measured, config.lengths, len(rows))
        write_text(config.out / "report.md", text)
    print(text)


def report(measured: Mapping[str, Mapping[int, Estimate]], lengths: Sequence[int], count: int) -> str:
    """Return the report in Markdown."""
    lines = [f"| n-grams of | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for name, of_name in measured.items():
        cells = [_cell(of_name[n]) if n in of_name else "" for n in lengths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return (
        f"# Overlap\n\nPercent of the n-grams of {count} continuations that occur in the corpus, by the number of "
        "words; ± is the standard error over documents. An overlap is not a trace: it does not say where a model has "
        "an n-gram from.\n\n" + "\n".join(lines) + "\n\n![Overlap](report.png)\n"
    )


def _cell(one: Estimate) -> str:
    return f"{100 * one.mean:.1f}" + ("" if one.stderr is None else f" ± {100 * one.stderr:.1f}")
