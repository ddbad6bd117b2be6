"""The speed at which data is prepared and loaded, beside the bare loops that bound it, in one run."""

import itertools
import os
import platform
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cepe_jax.config import DECODERS, ENCODERS, CepeConfig
from cepe_jax.cost import CHIPS, cepe_flops
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.loader import batches, examples, open_mix
from cepe_jax.data.recipes import WindowsInContext
from cepe_jax.data.records import Records
from cepe_jax.data.sampling import SampleConfig, sample
from cepe_jax.data.sources import plan, read
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.directories import write_json, write_text

POD = "v5e", 256, 0.4  # chip, number of chips, share of their peak


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkConfig:
    input: Path  # a directory of raw documents
    tokenizer: str  # its file or directory
    out: Path  # gets data.json and data.md
    patterns: tuple[str, ...] = PrepareConfig.patterns  # files below `input`
    exclude: tuple[str, ...] = ()  # files below a folder of one of these names are left out
    repeats: int = 3  # repetitions of each measurement, of which the fastest counts
    batch_size: int = 8  # sequences of a batch
    examples: ExampleConfig = ExampleConfig(window=1024, num_chunks=12, chunk_length=256)  # how they become examples
    workers: int = 2  # loading processes, which are compared with threads alone


def fastest(repeats: int, work: Callable[[], None]) -> float:
    """Seconds of the fastest of `repeats` runs."""

    def once() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return min(once() for _ in range(repeats))


def demanded() -> dict:
    """Tokens per second that a pod training the paper's model asks of one host, by arithmetic."""
    name, chips, share = POD
    chip, config = CHIPS[name], ExampleConfig()
    model = CepeConfig(DECODERS["llama2_7b"], ENCODERS["mlm_large"])
    flops = cepe_flops(model, config.window, config.num_chunks, config.chunk_length).train
    tokens = config.window + config.num_chunks * config.chunk_length
    rate = chips * chip.peak_flops * share / flops * tokens
    return {"pod": f"{name}-{chips} at {share:.0%} of peak", "tokens": rate, "host": rate / (chips / chip.per_host)}


def benchmark(config: DataBenchmarkConfig) -> None:
    """The table of speeds, printed and in `config.out`."""
    config.out.mkdir(parents=True, exist_ok=True)
    rows, facts = [], {}
    with tempfile.TemporaryDirectory(dir=config.out) as scratch:
        _measure(config, Path(scratch), rows, facts)
    report = {
        "rows": rows,
        "demanded": demanded(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **facts,
    }
    page = markdown(report)
    write_text(config.out / "data.md", page)
    write_json(config.out / "data.json", report)
    print(page)


def _measure(config: DataBenchmarkConfig, scratch: Path, rows: list[dict], facts: dict) -> None:
    units = plan(config.input, config.patterns, config.exclude, PrepareConfig.unit_bytes, config.out)
    extents = [extent for unit in units for extent in unit]
    texts = [d.text for extent in extents for d in read(config.input, extent, "") if d.text and d.text.strip()]
    tokenizer = Tokenizer(config.tokenizer)
    tokens = sum(len(tokenizer.encode(text, bos=True, eos=True)) for text in texts)
    facts |= {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": tokens}

    def row(what: str, work: Callable[[], None], count: int = tokens, processes: int = 1) -> None:
        rate = count / fastest(config.repeats, work)
        rows.append({"what": what, "tokens_per_second": rate, "per_process": rate / processes})
        print(f"{what}: {rows[-1]['tokens_per_second']:,.0f} tokens a second", flush=True)

    def read_files() -> None:
        for extent in extents:
            (config.input / extent.path).read_bytes()

    row("plain read of the files", read_files)
    for name, encode in bare_loops(tokenizer).items():
        row(f"bare {name} loop", lambda encode=encode: [encode(text) for text in texts])
    numbers = itertools.count()

    def prepare_once() -> Path:
        out = scratch / f"documents{next(numbers)}"
        prepare(
            PrepareConfig(
                input=config.input,
                out=out,
                patterns=config.patterns,
                exclude=config.exclude,
                tokenizer=config.tokenizer,
                skip_shorter=1,
                test_fraction=0.1,
                retrieval_fraction=0.0,
                workers=1,
            )
        )
        return out

    row("prepare", prepare_once)
    size = config.examples.window + config.examples.num_chunks * config.examples.chunk_length
    settings = {"data": prepare_once(), "kind": "packed", "length": size, "workers": 1}

    def sample_once() -> None:
        sample(SampleConfig(out=scratch / f"packed{next(numbers)}", **settings))

    sample(SampleConfig(out=scratch / "packed", **settings))
    records = Records(scratch / "packed", "train")
    sequences = len(records)
    row("sample, packed", sample_once, sequences * size)
    row("plain read of the sequences", lambda: [record["tokens"] for record in records], sequences * size)
    recipe = WindowsInContext(config.examples)
    data = examples(open_mix(scratch / "packed", {}, recipe), [1.0], recipe, seed=0)
    steps = max(sequences // config.batch_size, 50)  # far more than are read ahead

    count = steps * config.batch_size * size
    for workers, name in ((0, "2 threads"), (config.workers, f"{config.workers} processes")):
        loading = batches(data, config.batch_size, workers=workers)
        next(loading)  # threads and processes have started
        row(f"load, {name}", lambda loading=loading: deque(islice(loading, steps), maxlen=0), count, max(workers, 1))
        loading.close()


def bare_loops(tokenizer: Tokenizer) -> dict[str, Callable[[str], list[int]]]:
    """The libraries' own encode functions for the tokenizer's vocabulary."""
    import sentencepiece
    import tokenizers

    if tokenizer.path.suffix == ".json":
        plain = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        plain.encode_special_tokens = True
        plain.no_padding()
        plain.no_truncation()
        return {"tokenizers": lambda text: plain.encode(text, add_special_tokens=False).ids}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (rank[piece], piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank and not processor.is_byte(rank[piece])
    ]
    merges = [(left, right) for _, left, right in sorted(merges)]
    unknown = processor.id_to_piece(processor.unk_id())
    model = tokenizers.models.BPE(rank, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    same_pieces = tokenizers.Tokenizer(model)
    same_pieces.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    return {
        "sentencepiece": processor.encode,
        "tokenizers": lambda text: same_pieces.encode(text, add_special_tokens=False).ids,
    }


def markdown(report: dict) -> str:
    """The report as a table for people."""
    bare = max(row["per_process"] for row in report["rows"] if row["what"].startswith("bare"))
    demand = report["demanded"]
    lines = [
        f"{report['documents']:,} documents, {report['bytes'] / 1e6:.1f} MB, {report['tokens']:,} tokens; "
        f"{report['device']}, Python {report['python']}",
        "",
        "| | tokens a second | a process | of the faster bare loop |",
        "|---|---|---|---|",
        *(
            f"| {row['what']} | {row['tokens_per_second']:,.0f} | {row['per_process']:,.0f} | "
            f"{row['per_process'] / bare:.2f} |"
            for row in report["rows"]
        ),
        "",
        f"A {demand['pod']} trains CEPE-7B on {demand['tokens']:,.0f} tokens a second: {demand['host']:,.0f} a host.",
    ]
    return "\n".join(lines) + "\n"
