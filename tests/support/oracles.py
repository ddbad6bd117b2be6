"""The oracles: CEPE (Yen, Gao, Chen, ACL 2024) in fp64 numpy, and generation without a cache.

There is no mask in the method: a padding token is left out, with the positions of the others unchanged in a chunk (they
count from the chunk's start) and counted from the first real token in the decoder.
"""

from collections.abc import Callable

import jax
import numpy as np

from cepe_jax.inference.generate import Draws, Sampling, sample
from support.models import float64

draw = jax.jit(sample)
NONE = np.zeros((2, 0, 5), int)  # a context without chunks


def layer(weights, index):
    """Layer `index` of a nested dict of stacks."""
    return {k: layer(v, index) if isinstance(v, dict) else v[index] for k, v in weights.items()}


def rms_norm(x_TD, weights, eps):
    """Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * scale."""
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * weights["scale"]


def rotate(x_TNH, positions_T, theta):
    """RoFormer, eq. 34, on pairs (i, i + H/2): pair i turns by position * theta^(-2i / H)."""
    out, half = x_TNH.copy(), x_TNH.shape[-1] // 2
    for i in range(half):
        cos, sin = (f(positions_T * theta ** (-i / half))[:, None] for f in (np.cos, np.sin))
        a, b = x_TNH[..., i], x_TNH[..., i + half]
        out[..., i], out[..., i + half] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(q_TNH, k_SKH, v_SKH, o_NHD, causal):
    """Vaswani et al. 2017, eq. 1; GQA (Ainslie et al. 2023): each kv head serves N / K query heads in turn."""
    T, N, H = q_TNH.shape
    out_TD = np.zeros((T, o_NHD.shape[-1]))
    for t in range(T):
        stop = t + 1 if causal else len(k_SKH)
        for n in range(N if stop else 0):
            head = n // (N // k_SKH.shape[1])
            weights = np.exp(k_SKH[:stop, head] @ q_TNH[t, n] / np.sqrt(H))
            out_TD[t] += weights / weights.sum() @ v_SKH[:stop, head] @ o_NHD[n]
    return out_TD


def heads(x_TD, w_DNH):
    return np.einsum("td,dnh->tnh", x_TD, w_DNH)


def block(x_TD, w, config, positions_T, causal, cross=None, memory_ME=None):
    """A Llama block; with `cross`, the memory is read between self-attention and MLP (CEPE, figure 1)."""
    a, eps, theta = w["attention"], config.norm_eps, config.rope.theta
    y_TD = rms_norm(x_TD, w["attention_norm"], eps)
    q_TNH, k_TKH = (rotate(heads(y_TD, a[name]), positions_T, theta) for name in "qk")
    x_TD = x_TD + attention(q_TNH, k_TKH, heads(y_TD, a["v"]), a["o"], causal)
    if cross is not None:  # no positions, no causal mask; its norm has the decoder's eps
        q_TNH = heads(rms_norm(x_TD, cross["norm"], eps), cross["q"])
        k_MKH, v_MKH = heads(memory_ME, cross["k"]), heads(memory_ME, cross["v"])
        x_TD = x_TD + attention(q_TNH, k_MKH, v_MKH, cross["o"], causal=False)
    y_TD = rms_norm(x_TD, w["mlp_norm"], eps)
    gate_TF = y_TD @ w["mlp"]["gate"]  # SwiGLU (Shazeer 2020): silu(x W_gate) * (x W_up) W_down
    return x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ w["mlp"]["up"])) @ w["mlp"]["down"]


def encode(w, config, ids_L, keep_L):
    """One chunk, read by itself and in both directions: what its real tokens leave after the final norm."""
    (positions,) = keep_L.nonzero()
    x_LE = w["embed"][ids_L[positions]]
    for i in range(config.num_layers):
        x_LE = block(x_LE, layer(w["layers"], i), config, positions, causal=False)
    return rms_norm(x_LE, w["norm"], config.norm_eps)


def sinusoid(number, width):
    """Vaswani et al. 2017, section 3.5, the sines before the cosines."""
    angles = [number / 10_000 ** (i / width) for i in range(0, width, 2)]
    return np.array([np.sin(angles), np.cos(angles)]).reshape(-1)


def method(w, config, ids_T, context_CL, keep_CL, readers=(1, 2)):
    """Logits of one row of real tokens; the layers in `readers` have cross-attention.

    The memory is all chunks' hidden states, side by side.
    """
    chunks = [encode(w["encoder"], config.encoder, *chunk) for chunk in zip(context_CL, keep_CL, strict=True)]
    if config.encoder.chunk_positions:
        last = config.encoder.chunk_positions - 1
        numbers = [min(len(chunks) - 1 - c, last) for c in range(len(chunks))]
        chunks = [chunk + sinusoid(number, config.encoder.width) for chunk, number in zip(chunks, numbers, strict=True)]
    memory_ME = np.concatenate([np.zeros((0, config.encoder.width)), *chunks])
    x_TD = w["decoder"]["embed"][ids_T]
    for i in range(config.decoder.num_layers):
        cross = layer(w["cross"], readers.index(i)) if i in readers else None
        w_i = layer(w["decoder"]["layers"], i)
        x_TD = block(x_TD, w_i, config.decoder, np.arange(len(ids_T)), True, cross, memory_ME)
    return rms_norm(x_TD, w["decoder"]["norm"], config.decoder.norm_eps) @ w["decoder"]["head"].T


def by_token_exactly(decoder, ids, attend: Callable, cross=None, memory_ME=None) -> np.ndarray:
    """Logits (T, V) of a decoder with a cache policy, one token at a time.

    `attend(layer, q_NH, keys_SKH, values_SKH)` gives the heads (N, H) of a token's attention to all tokens so far;
    queries and keys are not rotated. `cross`: weights of the last layers, which read the memory too.
    """
    w, config = float64(decoder), decoder.config
    kept, out = [([], []) for _ in range(config.num_layers)], []
    for token in ids:
        x_1D = w["embed"][[token]]
        for index, (keys, values) in enumerate(kept):
            of_layer = layer(w["layers"], index)
            a, y_1D = of_layer["attention"], rms_norm(x_1D, of_layer["attention_norm"], config.norm_eps)
            keys.append(heads(y_1D, a["k"])[0])
            values.append(heads(y_1D, a["v"])[0])
            read_NH = attend(index, heads(y_1D, a["q"])[0], np.array(keys), np.array(values))
            x_1D = x_1D + np.einsum("nh,nhd->d", read_NH, a["o"])
            if cross is not None and index >= config.num_layers - len(cross["q"]):
                reads = layer(cross, index - config.num_layers + len(cross["q"]))
                q_1NH = heads(rms_norm(x_1D, reads["norm"], config.norm_eps), reads["q"])
                of_memory = heads(memory_ME, reads["k"]), heads(memory_ME, reads["v"])
                x_1D = x_1D + attention(q_1NH, *of_memory, reads["o"], causal=False)
            y_1D = rms_norm(x_1D, of_layer["mlp_norm"], config.norm_eps)
            gate_1F = y_1D @ of_layer["mlp"]["gate"]
            x_1D = x_1D + (gate_1F / (1 + np.exp(-gate_1F)) * (y_1D @ of_layer["mlp"]["up"])) @ of_layer["mlp"]["down"]
        out.append(rms_norm(x_1D, w["norm"], config.norm_eps)[0] @ w["head"].T)
    return np.array(out)


def recompute(call: Callable, prompts: list[list[int]], samplings: list[Sampling], steps: int) -> list[list[int]]:
    """The whole model anew for each token: no cache, no masked padding; what stands after a token it cannot see.

    Each row is drawn by itself.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.zeros((len(prompts), lengths.max() + steps), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    for step in range(steps):
        logits_BTV = call(tokens_BT)
        for row, sampling in enumerate(samplings):
            end = lengths[row] + step
            draws = Draws.of([sampling]).at(step)
            tokens_BT[row, end] = draw(logits_BTV[row : row + 1, end - 1], draws)[0]
    return [tokens_BT[row, n : n + steps].tolist() for row, n in enumerate(lengths)]
