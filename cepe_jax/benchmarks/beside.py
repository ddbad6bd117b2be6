"""Encoding, the first token and the next ones beside the tests' oracle in PyTorch, measured in turn."""

import jax
import numpy as np

from cepe_jax.benchmarks.training import in_turn, torch_oracle
from cepe_jax.inference.caches import FULL, new_cache
from cepe_jax.inference.context import encode_chunks
from cepe_jax.inference.generate import Draws, Sampling, bucket, next_token
from cepe_jax.model.cepe import Cepe
from cepe_jax.model.cross import Memory

NUMBER = 7  # of runs; the least counts


class Reader:
    """A reader of one context and prompt, with the methods of the oracle's `Reader`."""

    def __init__(self, model: Cepe, context_BCL: np.ndarray, prompt_BT: np.ndarray, slots: int):
        self.model, self.context_BCL, self.prompt_BT, self.slots = model, context_BCL, prompt_BT, slots

    def encode(self) -> jax.Array:
        return encode_chunks(self.model, self.context_BCL, None)

    def first_token(self) -> jax.Array:
        self.memory = Memory(self.encode())
        self.last_B1, self.cache = self.prompt_BT, new_cache(self.model.decoder, FULL, 1, self.slots)
        return self.next_token()

    def next_token(self) -> jax.Array:
        draws = Draws.of([Sampling()])
        self.last_B1, self.cache = next_token(self.model, self.last_B1, None, self.memory, self.cache, draws)
        return self.last_B1


def measure_beside(
    model: Cepe, contexts: tuple[int, ...], chunk_length: int, prompt: int
) -> list[dict[str, float | int | str]]:
    """The least seconds of ours and of the oracle's, by what is measured and tokens of context.

    `a token` is compared with the oracle that recomputes keys and values of the memory, as the reference does, and with
    one that keeps them.
    """
    oracle, vocab_size, rows = torch_oracle(model.decoder.compute.dtype), model.decoder.config.vocab_size, []
    draw = np.random.default_rng(0)
    for length in contexts:
        context_BCL = draw.integers(0, vocab_size, (1, -(-length // chunk_length), chunk_length), np.int32)
        prompt_BT = draw.integers(0, vocab_size, (1, prompt), np.int32)
        ours = Reader(model, context_BCL, prompt_BT, bucket(prompt + 2 + NUMBER))
        theirs, keeps = (oracle.Reader(model, context_BCL, prompt_BT) for _ in range(2))
        keeps.start(keeps.oracle.keep(keeps.memory))
        measured = {
            "encode": {"ours": ours.encode, "torch": theirs.encode},
            "first token": {"ours": ours.first_token, "torch": theirs.first_token},
            "a token": {
                "ours": ours.next_token,
                "torch": theirs.next_token,
                "torch, keys and values kept": keeps.next_token,
            },
        }
        for what, functions in measured.items():
            least = {name: min(runs.seconds) for name, runs in in_turn(functions, NUMBER).items()}
            rows += [{"context": length, "what": what, "beside": name, "ours": least["ours"], "theirs": seconds}
                     for name, seconds in least.items() if name != "ours"]  # fmt: skip
    return rows


def table(rows: list[dict], head: str) -> str:
    """The rows of `measure_beside` in lines for people."""
    lines = [head, "", "| context | what | ours | beside | | ours / theirs |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]
        lines.append(
            f"| {row['context']:,} | {row['what']} | {ours:.4g} s | {row['beside']} | {theirs:.4g} s "
            f"| {ours / theirs:.2f} |"
        )
    return "\n".join(lines) + "\n"
