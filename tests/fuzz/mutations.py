"""Seeded mutations of bytes, JSON, texts of settings and chat templates."""

import gzip
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000
# Values of JSON as they are written: of every type, at and beyond the bounds of sizes, and what no reader can mean.
VALUES = ["null", "true", "false", "0", "1", "2", "3", "-1", "-5", "0.5", "1e30", "-0.0", "1e400", "NaN", "Infinity"]
VALUES += [
    "4000000000",
    "2147483648",
    "9223372036854775808",
    f"1{'0' * 400}",
    LONG,
    DEEP,
    '""',
    '"x"',
    '"3"',
    '"é\\ud83d"',
]
VALUES += ["[]", "[null]", '["x"]', "[1, 2]", "{}", '{"x": 1}', '{"content": 5}', '"../elsewhere/x.safetensors"']
# Texts of a setting: what YAML reads as something else, numbers at their bounds, and what must not be run or unfolded.
TEXTS = ["", "~", "null", "true", "yes", "off", "0", "1", "2", "3", "-1", "010", "1:30", "0x10", "1_000", "1e3", "0.5"]
TEXTS += [
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "-0.0",
    "2147483648",
    f"1{'0' * 30}",
    LONG,
    "2026-01-01",
    "x",
    "é",
    "a b",
    "*",
]
TEXTS += ["[1, 2]", "[true]", "[0, 1e3]", "[[1]]", "[]", "{a: 1}", "{}", "'", '"', "- 1", "[" * 3_000, "{a: 1, a: 2}"]
TEXTS += [
    "!!python/object/apply:os.mkdir [ran]",
    "!!binary aGk=",
    "!!set {a, b}",
    "float32",
    "gs://bucket/x",
    "\x00",
    "\ud800",
]


def bomb(levels: int) -> str:
    """Return YAML whose aliases unfold to 9 to the power of `levels` items."""
    lists = ["&a0 [x,x,x,x,x,x,x,x,x]"]
    lists += [f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return f"[{', '.join(lists)}]"


TEXTS += [bomb(6), bomb(9)]


def pick(rng: Rng, items: Sequence) -> Any:
    return items[int(rng.integers(len(items)))]


def change_bytes(data: bytes, rng: Rng) -> bytes:
    """Flip a bit, cut the end, remove, repeat, clear or insert a block."""
    at = int(rng.integers(len(data) + 1))
    end = min(at + int(rng.integers(1, 65)), len(data))
    block = data[at:end]
    match int(rng.integers(6)):
        case 0 if block:
            return data[:at] + bytes([block[0] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + block + data[end:]
        case 4:
            return data[:at] + bytes(len(block)) + data[end:]
    return data[:at] + rng.bytes(end - at + 1) + data[at:]


def change_number(data: bytes, rng: Rng, at: int) -> bytes:
    """Write an extreme number of 4 or 8 bytes at `at`."""
    numbers = [0, 1, 2, 8, 31, 32, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    number, form = pick(rng, numbers), pick(rng, ["<I", "<Q"])
    packed = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
    return data[:at] + packed + data[at + len(packed) :]


def change_json(text: str, rng: Rng, values: Sequence[str] = VALUES) -> tuple[str, list[str]]:
    """Return JSON with one key dropped, doubled, renamed or given another value, and the keys that lead there."""
    content, keys = json.loads(text), []
    holder, place = [content], 0
    while isinstance(holder[place], dict | list) and holder[place] and (not keys or rng.random() < 0.7):
        holder = holder[place]
        place = pick(rng, sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        keys.append(str(place))
    raw = {"@value@": pick(rng, values)}  # JSON that no Python value is written as
    match int(rng.integers(6)):
        case 0 if keys:
            del holder[place]
        case 1 if isinstance(holder, dict):
            raw = {'"@key@"': json.dumps(place)}
            holder["@key@"] = pick(rng, [holder[place], "x"])
        case 2 if isinstance(holder, dict):
            holder[f"{place}_"] = holder.pop(place)
        case _:
            holder[place] = "@value@"
            raw = {'"@value@"': raw["@value@"]}
    written = json.dumps(content if keys else holder[0])
    for mark, instead in raw.items():
        written = written.replace(mark, instead, 1)
    return written, keys


def change_lines(text: str, rng: Rng) -> str:
    """Return JSON Lines with one line changed."""
    lines = text.splitlines()
    at = int(rng.integers(len(lines)))
    lines[at] = change_json(lines[at], rng)[0]
    return "\n".join(lines) + "\n"


def packed(data: bytes, suffix: str) -> bytes:
    """Return the data compressed as files with this suffix are."""
    if suffix == ".gz":
        return gzip.compress(data, mtime=0)
    return zstd().compress(data) if suffix == ".zst" else data


def zstd() -> Any:
    """Return Python's module for zstd."""
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd


def compressed_bomb(suffix: str, size: int = 4 << 30) -> bytes:
    """Return a small file that unfolds to `size` letters."""
    part = 64 << 20
    return packed(b"a" * part, suffix) * (size // part)


# Parts of chat templates: endless, huge, nested too deeply, wrong, and attempts to leave the sandbox.
BODIES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set a = 9 ** 9 %}{{ a ** (a ** a) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ ('x' * 1000000) | wordwrap(1) }}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ messages | tojson(indent=10 ** 8) }}",
    "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{{ " + " + ".join(["1"] * 5000) + " }}",
    "{% break %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('a\nb') }}",
    "{{ messages[9]['content'] }}",
    "{{ 1 // 0 }}",
    "{{ strftime_now('%Y') }}",
    "{{ undefined_name.x }}",
    "{{ bos_token }}{{ eos_token }}<|im_start|>",
    "{% include 'x' %}{% import 'os' as os %}",
    "{{ '%s' | format(1) }}{{ '{0.__class__}'.format(1) }}",
    "{% generation %}x{% endgeneration %}",
    "\x00\ud800".encode("utf-8", "replace").decode(),
]


def change_template(text: str, rng: Rng) -> bytes:
    """Return a chat template with its bytes changed or a part put into it."""
    if rng.random() < 0.4:
        return change_bytes(text.encode(), rng)
    at = int(rng.integers(len(text) + 1)) if rng.random() < 0.3 else len(text)
    return (text[:at] + pick(rng, BODIES) + text[at:]).encode()
