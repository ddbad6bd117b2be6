"""Suffix arrays of integers in numpy, by prefix doubling (Manber and Myers 1993; Larsson and Sadakane 2007).

A round sorts only places whose suffix is not told apart yet, in slices of whole groups: a long text that is copied many
times costs a round for each doubling of its length, and a round costs what is copied.
"""

import numpy as np

SLICE = 1 << 22  # places that are sorted at once, at least: temporaries of a round have this length


def suffix_array(values: np.ndarray, size: int = SLICE) -> np.ndarray:
    """Return the starts of all suffixes of `values` (N,), which are not negative, in lexicographic order.

    A suffix that is the beginning of another stands before it. Takes about 24 bytes a value beside `values`.
    """
    N = len(values)
    dtype = np.int32 if N < 2**31 - 1 else np.int64
    if N == 0:
        return np.zeros(0, dtype)
    bits = int(values.max() + 1).bit_length()
    depth = max(62 // bits, 1)  # values that are compared in the first round, packed into one number
    keys = values.astype(np.int64) + 1
    for step in range(1, depth):
        keys <<= bits
        keys[: max(N - step, 0)] |= values[step:] + 1
    suffixes = np.argsort(keys).astype(dtype)
    starts = np.ones(N + 1, bool)  # where a group of suffixes begins that are not told apart; N ends the last one
    ranks = np.empty(N, dtype)  # of each suffix, where its group begins
    sorted_keys = keys[suffixes]
    starts[1:N] = sorted_keys[1:] != sorted_keys[:-1]
    del keys, sorted_keys
    ranks[suffixes] = np.maximum.accumulate(np.where(starts[:N], np.arange(N, dtype=dtype), 0))
    while not starts.all():
        begin = 0
        while begin < N:
            end = min(begin + size, N)
            end += int(starts[end:].argmax())
            _sort(suffixes, ranks, starts, begin, end, depth)
            begin = end
        depth *= 2
    return suffixes


def _sort(suffixes: np.ndarray, ranks: np.ndarray, starts: np.ndarray, begin: int, end: int, depth: int) -> None:
    """Sort the groups in suffixes[begin:end] by the ranks of what follows `depth` values later.

    Ranks are refined in place: one that another slice has refined already is as true, and tells more apart.
    """
    alone = starts[begin:end] & starts[begin + 1 : end + 1]
    at = np.flatnonzero(~alone) + begin
    if not len(at):
        return
    places = suffixes[at]
    later = places.astype(np.int64) + depth
    following = np.where(later < len(suffixes), ranks[np.minimum(later, len(suffixes) - 1)], -1)
    keys = ranks[places].astype(np.int64) * (len(suffixes) + 1) + (following + 1)
    order = np.argsort(keys)
    places, keys = places[order], keys[order]
    suffixes[at] = places
    first = np.append(True, keys[1:] != keys[:-1])
    starts[at] |= first
    ranks[places] = np.maximum.accumulate(np.where(first, at, 0))
