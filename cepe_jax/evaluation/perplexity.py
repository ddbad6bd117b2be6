"""How much a context helps: nll of the last tokens of held-out documents against the number of context chunks."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from cepe_jax.data.examples import Document, chunks_before, window_at
from cepe_jax.inference.context import encode_chunks
from cepe_jax.model.cepe import Cepe
from cepe_jax.progress import track
from cepe_jax.training.objectives import token_nll


@dataclass(frozen=True)
class Window:
    """A window of one document and where its contexts end: the same place in the document, and one in another's."""

    document: Document
    start: int
    other: Document
    other_end: int


def choose_windows(documents: Iterable[Document], window: int, context: int) -> list[Window]:
    """One window in the middle of each document that has `context` tokens before it and is long enough.

    The other document of a window is the next one in the list, read up to its own window.
    """
    chosen = [document for document in documents if len(document.tokens) > context + window]
    if len(chosen) < 2:
        raise ValueError(
            f"{len(chosen)} documents are longer than the {context + window} tokens asked for: 2 are needed"
        )
    starts = [max(context, (len(document.tokens) - window) // 2) for document in chosen]
    places = list(zip(chosen, starts, strict=True))
    return [Window(*place, *other) for place, other in zip(places, places[1:] + places[:1], strict=True)]


@partial(jax.jit, static_argnames="scored")
def _nll(model: Cepe, tokens_BT, labels_BT, memory_BME, memory_mask_BM, scored: int) -> jax.Array:
    hidden_BTD, _ = model.decode(tokens_BT, memory_BME, memory_mask_BM)
    logits = model.decoder.logits(hidden_BTD[:, -scored:])
    return token_nll(logits, labels_BT[:, -scored:]).mean(axis=1)


def context_nll(
    model: Cepe, windows: list[Window], window: int, scored: int, counts: list[int], chunk_length: int, batch: int = 16
) -> dict[tuple[str, int], np.ndarray]:
    """(kind, chunks) -> nll per document in nats per token, over the last `scored` tokens of each window.

    Kinds: `none` with 0 chunks; `previous`, the chunks right before the window; `other`, another document's. All
    counts read the end of one memory: chunks do not see each other.
    """
    most = max(counts)
    results: dict[tuple[str, int], list] = {("none", 0): []}
    results |= {(kind, count): [] for kind in ("previous", "other") for count in counts}
    for first in track(range(0, len(windows), batch), "evaluate"):
        rows = windows[first : first + batch]
        rows = rows + [rows[-1]] * (batch - len(rows))  # one shape, one compilation
        views = [window_at(row.document.tokens, row.start, window) for row in rows]
        tokens, labels = (np.stack([view[name] for view in views]) for name in ("tokens", "labels"))
        for kind in ("previous", "other"):
            ends = [(r.document, r.start) if kind == "previous" else (r.other, r.other_end) for r in rows]
            contexts = [chunks_before(document.tokens, end, most, chunk_length) for document, end in ends]
            context, real = (np.stack([c[name] for c in contexts]) for name in ("context", "context_mask"))
            memory = encode_chunks(model, context, real)
            for count in counts if kind == "other" else [0, *counts]:
                last = most * chunk_length - count * chunk_length
                read = (memory[:, last:], real.reshape(batch, -1)[:, last:]) if count else (None, None)
                results["none" if count == 0 else kind, count].append(_nll(model, tokens, labels, *read, scored))
    return {key: np.concatenate(values)[: len(windows)] for key, values in results.items()}
