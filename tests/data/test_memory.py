"""Memory of preparation, as the system counts it: the same for any size of corpus, and little for one long document."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import byte_level

from cepe_jax.data.corpus import Corpus
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.data.tokenizer_training import train, training_pieces

# The largest resident size of this process and of the largest of its children, in MB.
PROGRAM = """
import resource, sys
from pathlib import Path
from cepe_jax.data.corpus import PrepareConfig, prepare
from cepe_jax.data.sampling import SampleConfig, sample
if __name__ == "__main__":
    home, workers, unit_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out = home / f"documents-{workers}"
    prepare(PrepareConfig(input=home / "in", out=out, tokenizer=str(home / sys.argv[4]), workers=workers,
                          unit_bytes=unit_bytes, test_fraction=0.3))
    if workers > 1:
        sample(SampleConfig(data=out, out=home / f"packed-{workers}", kind="packed", length=256, workers=workers))
    # Not of RUSAGE_SELF, in which that of the process before it is still counted.
    own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(own.split()[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def measure(home: Path, workers: int, unit_bytes: int, kind: str = "tokenizer.json") -> tuple[int, int]:
    arguments = [sys.executable, "-c", PROGRAM, str(home), str(workers), str(unit_bytes), kind]
    if workers > 1:  # its processes read the program from a file
        (home / "program.py").write_text(PROGRAM)
        arguments[1:3] = [str(home / "program.py")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    driver, worker = map(int, done.stdout.split())
    return driver, worker


def write(home: Path, texts, vocabulary: str) -> None:
    byte_level(home / "tokenizer.json", vocab_size=600, texts=[vocabulary])
    (home / "in" / "web").mkdir(parents=True)
    with open(home / "in" / "web" / "a.jsonl", "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Sixteen times as many units of 1 MB, with some thousand documents each."""
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}" for a, b in rng.integers(0, 99, (1000, 2))])
    sizes = []
    for megabytes in 2, 32:
        home = tmp_path / str(megabytes)
        home.mkdir()
        write(home, (" ".join(rng.choice(words, 60)) for _ in range(megabytes * 4200)), " ".join(words))
        sizes.append(measure(home, 2, 1 << 20))
    (small_driver, small_worker), (driver, worker) = sizes
    assert driver < 1.1 * small_driver
    assert worker < 1.1 * small_worker


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_one_long_document_takes_little_memory(tmp_path, kind):
    """50 MB, with characters for which Python keeps four bytes of each: the ids alone would take 400 MB as a list."""
    part = "Some words of a line, 漢字 and 🙂 among them, as they come.\n" * 1000
    long = part * (50_000_000 // len(part.encode()))
    write(tmp_path, [long, *(f"{number} {part[:500]}" for number in range(40))], part)
    if kind == "tokenizer.model":
        train(training_pieces(part), 320, tmp_path / kind)
    assert measure(tmp_path, 1, 1 << 28, kind)[0] < 600
    corpora = (Corpus(tmp_path / "documents-1", split) for split in ("train", "retrieval"))
    document = max((document for corpus in corpora for document in corpus), key=lambda one: len(one.tokens))
    assert Tokenizer(tmp_path / kind).decode(document.tokens) == long
