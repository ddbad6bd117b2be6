"""TAGCOS end to end on planted mixtures, against random choices and all the data; five seeds.

Each skill is a permutation of symbols, named by a sequence's first token; a pretrained decoder learns them by factors.
14 CPU-minutes: these say what a selection is worth. The table of `cepe_jax/selection/README.md` is printed.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import ttest_1samp
from support import datasets

from cepe_jax.config import DecoderConfig, LoraConfig, RopeConfig
from cepe_jax.data.builder import array
from cepe_jax.data.examples import ExampleConfig
from cepe_jax.data.records import Records
from cepe_jax.data.sampling import apportion
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.model.llama import Llama
from cepe_jax.selection.coreset import clusters_of
from cepe_jax.selection.tagcos import TagcosConfig, tagcos
from cepe_jax.training.heldout import EvalConfig
from cepe_jax.training.optimizer import OptimizerConfig
from cepe_jax.training.run import run_stage
from cepe_jax.training.settings import TrainConfig
from cepe_jax.weights.source import save

pytestmark = pytest.mark.slow
SKILLS, SYMBOLS, LENGTH = 16, 32, 24
FIRST_SKILL, FIRST_SYMBOL = 10, 40  # ids
TOTAL, COPIED, COPIES, NOISE = 2000, 12, 50, 400  # sequences; of the mixture with copies COPIED ones have COPIES each
MIXTURES = {"skills, copies, noise": TOTAL - COPIED * COPIES - NOISE, "skills alone": TOTAL}  # proper sequences
FRACTION, CLUSTERS, DIM = 0.05, 20, 512
WARM_UP, STEPS, BATCH = 30, 300, 16
SEEDS = 5
CHOICES = "all", "random", "random by cluster", "TAGCOS", "TAGCOS, weighted"


def path_of(permutation: np.ndarray, start: int) -> list[int]:
    path = [start]
    while len(path) < LENGTH:
        path.append(permutation[path[-1]])
    return path


def skilled(rng: np.random.Generator, permutations: np.ndarray, count: int) -> list[np.ndarray]:
    """Return sequences of skills, of which the n-th is drawn with a chance as 1 / n."""
    chance = 1 / np.arange(1, SKILLS + 1)
    skills = rng.choice(SKILLS, count, p=chance / chance.sum())
    paths = [path_of(permutations[skill], rng.integers(SYMBOLS)) for skill in skills]
    return [
        np.array([FIRST_SKILL + n, *(FIRST_SYMBOL + np.array(path))]) for n, path in zip(skills, paths, strict=True)
    ]


def mixture(rng: np.random.Generator, permutations: np.ndarray, proper: int) -> list[np.ndarray]:
    """Return proper sequences; if they are not all, also copies of few with one other symbol each, and noise."""
    sequences = skilled(rng, permutations, proper)
    if proper == TOTAL:
        return sequences
    copies = [one.copy() for one in skilled(rng, permutations, COPIED) for _ in range(COPIES)]
    for one in copies:
        one[rng.integers(1, LENGTH + 1)] = FIRST_SYMBOL + rng.integers(SYMBOLS)
    symbols = FIRST_SYMBOL + rng.integers(SYMBOLS, size=(NOISE, LENGTH))
    noise = np.concatenate([FIRST_SKILL + rng.integers(SKILLS, size=(NOISE, 1)), symbols], axis=1)
    return [*sequences, *copies, *noise]


def kinds(numbers: np.ndarray, proper: int) -> dict[str, float]:
    """Return the shares of proper sequences, copies and noise."""
    ends = proper, proper + COPIED * COPIES
    counts = np.bincount(np.searchsorted(ends, numbers, side="right"), minlength=3)
    return dict(zip(("proper", "copies", "noise"), (counts / len(numbers)).tolist(), strict=True))


def settings(data: Path, out: Path, decoder: Path, steps: int, **more) -> TrainConfig:
    examples = ExampleConfig(window=LENGTH)
    return TrainConfig("lm", data, out, steps, BATCH, decoder=str(decoder), examples=examples, log_every=steps, **more)


def pretrained(home: Path) -> tuple[Path, Tokenizer]:
    """Return a decoder that knows sequences of permutations, each with another one, and no skill; its tokenizer."""
    tokenizer = datasets.make_tokenizer(home)
    sizes = {"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_width": 128}
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, rope=RopeConfig(theta=1000.0), **sizes)
    save(jax.jit(lambda key: Llama(config, key=key))(jax.random.key(0)), home / "new", assets=home)
    rng = np.random.default_rng(0)
    permutations = np.stack([rng.permutation(SYMBOLS) for _ in range(SKILLS)])
    sequences = [one for _ in range(200) for one in skilled(rng, rng.permuted(permutations, axis=1), 20)]
    datasets.write_sequences(home / "general", sequences, LENGTH, tokenizer)
    optimizer = OptimizerConfig(learning_rate=3e-3)
    run_stage(settings(home / "general", home / "base", home / "new", 500, optimizer=optimizer))
    return home / "base/model", tokenizer


def select(place: Path, data: Path, numbers: np.ndarray, tokenizer: Tokenizer) -> None:
    """Write a coreset of these records."""
    features = {"number": array(np.int64), "repeats": array(np.int32)}
    rows = [{"number": np.int64(number), "repeats": np.int32(1)} for number in np.sort(numbers)]
    datasets.write(place, "coreset", features, [rows], tokenizer, selects=datasets.joins(data))


def losses(seed: int, proper: int, home: Path, decoder: Path, tokenizer: Tokenizer) -> tuple[dict, dict]:
    """Return the losses on unseen proper sequences after training on each choice, and the kinds that were chosen."""
    home.mkdir()
    rng = np.random.default_rng(seed)
    permutations = np.stack([rng.permutation(SYMBOLS) for _ in range(SKILLS)])
    data = datasets.write_sequences(home / "all", mixture(rng, permutations, proper), LENGTH, tokenizer)
    datasets.write_sequences(home / "unseen", skilled(rng, permutations, 512), LENGTH, tokenizer)
    factors = {"train": ("decoder_lora",), "lora": LoraConfig(16, 32.0), "seed": seed}
    factors["optimizer"] = OptimizerConfig(learning_rate=3e-3)
    run_stage(settings(data, home / "warm-up", decoder, WARM_UP, save_every=10, keep=0, **factors))
    for name in ("TAGCOS", "TAGCOS, weighted"):
        given = {"run": home / "warm-up", "steps": (10, 20, 30), "data": data, "features": home / "features"}
        given |= {"fraction": FRACTION, "clusters": CLUSTERS, "dim": DIM, "batch_size": 64, "seed": seed}
        tagcos(TagcosConfig(**given, out=home / name, use_weights=name != "TAGCOS"))
    select(home / "random", data, rng.permutation(TOTAL)[: round(FRACTION * TOTAL)], tokenizer)
    paths = sorted((home / "features").glob("*.npy"))
    labels, _ = clusters_of(np.concatenate([np.load(path) for path in paths]), CLUSTERS, seed, starts=1)
    members = [rng.permutation(np.flatnonzero(labels == cluster)) for cluster in range(CLUSTERS)]
    shares = apportion(round(FRACTION * TOTAL), [len(one) for one in members])
    by_cluster = np.concatenate([one[:share] for one, share in zip(members, shares, strict=True)])
    select(home / "random by cluster", data, by_cluster, tokenizer)
    chosen = {name: np.array([int(r["number"]) for r in Records(home / name, "train")]) for name in CHOICES[1:]}
    nll = {}
    for name in CHOICES:
        out, evaluation = home / f"trained on {name}", EvalConfig(home / "unseen", "train", STEPS, 512 // BATCH)
        run_stage(settings(home / name, out, decoder, STEPS, evaluation=evaluation, **factors))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        nll[name] = next(line["eval_nll"] for line in lines if "eval_nll" in line)
    return nll, {name: kinds(numbers, proper) for name, numbers in chosen.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the mean, by Student's t."""
    return ttest_1samp(values, 0).confidence_interval()


def gains(pairs: list[tuple[dict, dict]], name: str, beside: str = "random") -> np.ndarray:
    """Return how much lower the losses of one choice are than another's, seed by seed."""
    return np.array([nll[beside] - nll[name] for nll, _ in pairs])


def shares(pairs: list[tuple[dict, dict]], name: str) -> dict[str, float]:
    """Return the mean shares of the kinds that were chosen."""
    return {kind: np.mean([kinds[name][kind] for _, kinds in pairs]) for kind in ("proper", "copies", "noise")}


def table(results: dict[str, list[tuple[dict, dict]]]) -> str:
    """Return the means over seeds, and the gain over a random choice of the same data with its interval."""
    columns = "mixture", "trained on", "nll", "gain on random", "proper", "copies", "noise"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for title, pairs in results.items():
        for name in CHOICES:
            gain, kinds = "", ["", "", ""]
            if name != "random":
                low, high = interval(gains(pairs, name))
                gain = f"{gains(pairs, name).mean():+.3f} ({low:+.3f} to {high:+.3f})"
            if name != "all":
                kinds = [f"{share:.0%}" for share in shares(pairs, name).values()]
            nll = np.mean([nll[name] for nll, _ in pairs])
            lines.append(f"| {title} | {name} | {nll:.3f} | {gain} | {' | '.join(kinds)} |")
    return "\n".join(lines)


def test_what_a_selection_is_worth(tmp_path):
    """TAGCOS is above a random choice, and above one within its clusters; all the data are above it."""
    decoder, tokenizer = pretrained(tmp_path)
    results = {}
    for title, proper in MIXTURES.items():
        places = [tmp_path / f"{title}, {seed}" for seed in range(SEEDS)]
        results[title] = [losses(n, proper, place, decoder, tokenizer) for n, place in enumerate(places)]
        print(f"\n{table(results)}", flush=True)
    for pairs in results.values():
        assert interval(gains(pairs, "TAGCOS"))[0] > 0
        assert gains(pairs, "TAGCOS", beside="random by cluster").mean() > 0
        assert gains(pairs, "all", beside="TAGCOS").mean() > 0
    mixed = results["skills, copies, noise"]
    assert shares(mixed, "TAGCOS")["copies"] < 0.6 * shares(mixed, "random")["copies"]
    assert shares(mixed, "TAGCOS")["noise"] > 0.5 * shares(mixed, "random")["noise"]
