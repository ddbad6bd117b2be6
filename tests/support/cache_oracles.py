"""The oracles of cache policies that choose what a head reads: ReAttention and RazorAttention in fp64 numpy.

Each policy is an `attend` for `in_pieces_exactly`: it gets what a layer has of all tokens so far, and says from its
definition alone what the queries of a piece read of that.
"""

from collections.abc import Callable

import numpy as np

from support.models import float64
from support.oracles import attention, heads, layer, rms_norm, rotate


def in_pieces_exactly(decoder, pieces, attend: Callable, cross=None, memory_ME=None) -> np.ndarray:
    """Logits (T, V) of all tokens of a decoder with a cache policy; each layer reads a piece of token ids at once.

    `attend(layer, q_TNH, keys_SKH, values_SKH)` gives the heads (T, N, H) of the attention of a piece's T tokens to all
    S tokens so far, the piece's own the last T of them; queries and keys are not rotated. `cross`: weights of the last
    layers, which read the memory too.
    """
    w, config = float64(decoder), decoder.config
    none_SKH = np.zeros((0, config.num_kv_heads, config.head_dim))
    kept, out = [(none_SKH, none_SKH)] * config.num_layers, []
    for piece in pieces:
        x_TD = w["embed"][piece]
        for index in range(config.num_layers):
            of_layer, (keys_SKH, values_SKH) = layer(w["layers"], index), kept[index]
            a, y_TD = of_layer["attention"], rms_norm(x_TD, of_layer["attention_norm"], config.norm_eps)
            keys_SKH = np.concatenate([keys_SKH, heads(y_TD, a["k"])])
            values_SKH = np.concatenate([values_SKH, heads(y_TD, a["v"])])
            kept[index] = keys_SKH, values_SKH
            read_TNH = attend(index, heads(y_TD, a["q"]), keys_SKH, values_SKH)
            x_TD = x_TD + np.einsum("tnh,nhd->td", read_TNH, a["o"])
            if cross is not None and index >= config.num_layers - len(cross["q"]):
                reads = layer(cross, index - config.num_layers + len(cross["q"]))
                q_TNH = heads(rms_norm(x_TD, reads["norm"], config.norm_eps), reads["q"])
                of_memory = heads(memory_ME, reads["k"]), heads(memory_ME, reads["v"])
                x_TD = x_TD + attention(q_TNH, *of_memory, reads["o"], causal=False)
            y_TD = rms_norm(x_TD, of_layer["mlp_norm"], config.norm_eps)
            gate_TF = y_TD @ of_layer["mlp"]["gate"]
            x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ of_layer["mlp"]["up"])) @ of_layer["mlp"]["down"]
        out.append(rms_norm(x_TD, w["norm"], config.norm_eps) @ w["head"].T)
    return np.concatenate(out)


def shares(scores_S) -> np.ndarray:
    """The softmax of scores."""
    weights_S = np.exp(scores_S - np.max(scores_S))
    return weights_S / weights_S.sum()


def best(values: dict, count: int) -> list:
    """The `count` keys with the largest values, or all; of equal values the smaller key comes first."""
    return sorted(values, key=lambda key: (-values[key], key))[:count]


def selection(q_TNH, keys_SKH, sinks: int, recent: int, span: int, top_k: int, selected: int) -> list[int]:
    """The tokens between sinks and recent ones that a piece's queries read, ascending.

    Each query head of each token votes for `top_k` tokens by content alone: queries and keys are not rotated. The
    `selected` tokens with most votes stay, each with its span.
    """
    group = q_TNH.shape[1] // keys_SKH.shape[1]
    middle = range(sinks, len(keys_SKH) - recent)
    votes = {}
    for q_NH in q_TNH:
        for n, q_H in enumerate(q_NH):
            # Where a token comes twice, its keys in the first layer are the same: rounded, so that this stays a tie.
            scores = {j: round(float(q_H @ keys_SKH[j, n // group]), 10) for j in middle}
            for j in best(scores, top_k):
                votes[j] = votes.get(j, 0) + 1
    chosen = set()
    for j in best(votes, selected):
        first = j - span // 2
        chosen.update(range(first, first + span))
    return sorted(chosen.intersection(middle))


def reattention(config, sinks: int, recent: int, span: int, top_k: int, selected: int) -> Callable:
    """The `attend` of ReAttention (arXiv 2407.15176): sinks, a selection, and recent tokens, at positions from 0 on."""

    def attend(index, q_TNH, keys_SKH, values_SKH):
        (T, N, H), b = q_TNH.shape, len(keys_SKH)
        middle = selection(q_TNH, keys_SKH, sinks, recent, span, top_k, selected)
        read = [*range(min(sinks, b)), *middle, *range(max(sinks, b - recent), b)]
        own = [read.index(token) for token in range(b - T, b)]  # all there unless the piece is longer than `recent`
        k_RKH = rotate(keys_SKH[read], np.arange(len(read)), config.rope.theta)
        q_TNH = rotate(q_TNH, np.array(own), config.rope.theta)
        out_TNH, group = np.zeros(q_TNH.shape), N // keys_SKH.shape[1]
        for t in range(T):
            seen = own[t] + 1  # `read` ascends: what is behind a token in it comes after the token in the text
            for n in range(N):
                weights = shares(k_RKH[:seen, n // group] @ q_TNH[t, n] / np.sqrt(H))
                out_TNH[t, n] = weights @ values_SKH[read[:seen], n // group]
        return out_TNH

    return attend


def razor(config, retrieval: set, sinks: int, recent: int, ratio: int, weighted: bool = True) -> Callable:
    """The `attend` of RazorAttention (arXiv 2407.15891), each token by itself.

    `retrieval`: the (layer, key head) that read all tokens. The others read sinks, a window, and the mean key and value
    of what is dropped between, which weigh as many tokens as they stand for, or one without `weighted`.
    """

    def attend(index, q_TNH, keys_SKH, values_SKH):
        (T, N, H), S = q_TNH.shape, len(keys_SKH)
        k_SKH = rotate(keys_SKH, np.arange(S), config.rope.theta)
        q_TNH = rotate(q_TNH, np.arange(S - T, S), config.rope.theta)
        out_TNH, group = np.zeros(q_TNH.shape), N // keys_SKH.shape[1]
        for t in range(T):
            count = S - T + t + 1  # tokens that are there, this one too
            window = max(recent, count // ratio)
            for n in range(N):
                head = n // group
                dropped = [] if (index, head) in retrieval else list(range(sinks, count - window))
                kept = [j for j in range(count) if j not in dropped]
                scores = [k_SKH[j, head] @ q_TNH[t, n] / np.sqrt(H) for j in kept]
                values = [values_SKH[j, head] for j in kept]
                if dropped:
                    score = k_SKH[dropped, head].mean(0) @ q_TNH[t, n] / np.sqrt(H)
                    scores.append(score + np.log(len(dropped)) if weighted else score)
                    values.append(values_SKH[dropped, head].mean(0))
                out_TNH[t, n] = shares(scores) @ np.array(values)
        return out_TNH

    return attend


def attention_maps(decoder, ids) -> np.ndarray:
    """The weights (Z, N, T, T) of each layer's causal attention over a text; 0 for what comes after a token."""
    config, T = decoder.config, len(ids)
    maps_ZNTT = np.zeros((config.num_layers, config.num_heads, T, T))

    def attend(index, q_TNH, keys_TKH, values_TKH):
        q_TNH, k_TKH = (rotate(x, np.arange(T), config.rope.theta) for x in (q_TNH, keys_TKH))
        out_TNH, group = np.zeros(q_TNH.shape), config.num_heads // config.num_kv_heads
        for t in range(T):
            for n in range(config.num_heads):
                weights = shares(k_TKH[: t + 1, n // group] @ q_TNH[t, n] / np.sqrt(config.head_dim))
                maps_ZNTT[index, n, t, : t + 1] = weights
                out_TNH[t, n] = weights @ values_TKH[: t + 1, n // group]
        return out_TNH

    in_pieces_exactly(decoder, [ids], attend)
    return maps_ZNTT


def head_scores(weights_NTT, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The induction and echo scores (N,) of query heads over a block of tokens that stands there four times.

    Echo: a token's attention to the same token in earlier blocks. Induction: to the tokens behind those. Both are means
    over all tokens after the first block.
    """
    N, T, _ = weights_NTT.shape
    assert 4 * block == T
    induction_N, echo_N = np.zeros(N), np.zeros(N)
    for n in range(N):
        for i in range(block, T):
            for earlier in range(i - block, -1, -block):
                echo_N[n] += weights_NTT[n, i, earlier]
                induction_N[n] += weights_NTT[n, i, earlier + 1]
    return induction_N / (T - block), echo_N / (T - block)


def retrieval_heads(induction_ZN, echo_ZN, group: int, induction_share: float, echo_share: float) -> set:
    """The (layer, key head) that are in the top share by induction or in the top share by echo.

    A key head has the best score of the `group` query heads that it serves.
    """
    found = set()
    for scores_ZN, share in ((induction_ZN, induction_share), (echo_ZN, echo_share)):
        Z, N = scores_ZN.shape
        by_head = {(z, k): max(scores_ZN[z, k * group : (k + 1) * group]) for z in range(Z) for k in range(N // group)}
        found.update(best(by_head, round(len(by_head) * share)))
    return found
