"""Encoded contexts against the model's uncached pass, on disk, and on a mesh.

Run as a script it compares meshes of the devices there are with no mesh.
"""

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models import DECODER, ENCODER, computed, make_cepe, relative_error, with_config, with_leaf
from support.oracles import recompute

from cepe_jax.devices import free_bytes
from cepe_jax.directories import one_writer_of
from cepe_jax.inference import context as module
from cepe_jax.inference.caches import Razor, ReAttention, Rolling, new_cache
from cepe_jax.inference.context import (
    ContextCache,
    DeviceMemories,
    encode,
    encode_chunks,
    encoder_identity,
    stacked,
)
from cepe_jax.inference.generate import Sampling, generate, next_token
from cepe_jax.inference.scoring import score
from cepe_jax.model.cepe import Cepe
from cepe_jax.sharding import make_mesh, shardings_of
from cepe_jax.weights.source import load, save

CHUNK = 40  # tokens
HOT = Sampling(temperature=1.5, seed=7)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [33]]
TOKENIZER = SimpleNamespace(fingerprint=lambda: "of-the-tokenizer")
LENGTHS = 70, 3, 40, 33, 90  # of the passages: chunks of 32 and of 40, of 3 to 40 real tokens


def make_passages(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, ENCODER.vocab_size, length).tolist() for length in lengths]


PASSAGES = make_passages(*LENGTHS)


def chunked(passages: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Contexts (1, C, L) and their mask, as the model takes them."""
    chunks = [tokens[at : at + CHUNK] for tokens in passages for at in range(0, len(tokens), CHUNK)]
    context, mask = np.zeros((1, len(chunks), CHUNK), np.int32), np.zeros((1, len(chunks), CHUNK), bool)
    for row, chunk in enumerate(chunks):
        context[0, row, : len(chunk)], mask[0, row, : len(chunk)] = chunk, True
    return context, mask


def narrow(cepe: Cepe) -> Cepe:
    parts = (computed(part, dtype="bfloat16") for part in (cepe.decoder, cepe.encoder))
    return Cepe(*parts, cepe.cross)


@pytest.fixture(scope="module")
def identity(cepe):
    return encoder_identity(cepe, TOKENIZER)


@pytest.fixture(scope="module")
def cache(cepe, identity):
    return encode(cepe, PASSAGES, identity, CHUNK)


@pytest.fixture
def encoded(monkeypatch):
    """Gets the number of real tokens of every batch of chunks that is encoded."""
    calls = []

    def counted(model, context_BCL, mask_BCL):
        calls.append(int(mask_BCL.sum()))
        return encode_chunks(model, context_BCL, mask_BCL)

    monkeypatch.setattr(module, "encode_chunks", counted)
    return calls


def test_states_are_the_models_own(cepe, cache):
    """Each token's state once, in order, of a chunk that is read by itself."""
    states_BME = jax.jit(Cepe.encode)(cepe, *chunked(PASSAGES)).states_BME
    wanted = np.asarray(states_BME)[chunked(PASSAGES)[1].reshape(1, -1)]
    assert [len(passage.states_LE) for passage in cache.passages] == list(LENGTHS)
    assert (len(cache), cache.num_tokens, cache.nbytes) == (5, 236, 236 * 16 * 4)
    assert relative_error(np.concatenate([passage.states_LE for passage in cache.passages]), wanted) < 1e-6
    memory = jax.tree.map(np.asarray, stacked([cache]))
    assert relative_error(memory.states_BME[memory.valid_BM], wanted) < 1e-6
    assert memory.states_BME.shape == (1, 256, 16)
    assert not memory.states_BME[~memory.valid_BM].any()


def test_positions_count_the_chunks_that_stand_after_one(cepe, tmp_path):
    """As the model's own memory has them, whatever passages come to stand together, and after a file."""
    cepe = Cepe(cepe.decoder, with_config(cepe.encoder, chunk_positions=4), cepe.cross)
    identity = encoder_identity(cepe, TOKENIZER)
    cache = encode(cepe, PASSAGES, identity, CHUNK)
    cache.save(tmp_path / "contexts")
    loaded = ContextCache.load(tmp_path / "contexts", identity)
    orders = [0, 1, 2, 3, 4], [1], [4, 0, 0]
    memory = jax.tree.map(np.asarray, stacked([loaded.select(order) for order in orders]))
    for order, states_ME, valid_M in zip(orders, memory.states_BME, memory.valid_BM, strict=True):
        context = chunked([PASSAGES[index] for index in order])
        wanted = np.asarray(jax.jit(Cepe.encode)(cepe, *context).states_BME)[context[1].reshape(1, -1)]
        assert relative_error(states_ME[valid_M], wanted) < 1e-6


def test_generation_from_a_cache_is_recomputed(cepe, cache, forward):
    """Token for token, from the shared memory, what the whole model draws anew for each token without any cache."""
    context = [np.repeat(part, 3, axis=0) for part in chunked(PASSAGES)]
    tokens = generate(cepe, PROMPTS, stacked([cache]), max_new_tokens=12, sampling=[HOT] * 3)
    assert tokens == recompute(lambda tokens_BT: forward(cepe, tokens_BT, *context), PROMPTS, [HOT] * 3, 12)
    assert tokens != generate(cepe, PROMPTS, max_new_tokens=12, sampling=HOT)


def test_a_context_for_each_row(cepe, identity, cache):
    """Of different lengths, one of them empty: each row is the one it is alone.

    5 CPU-seconds: each row alone is a program of its own.
    """
    caches = cache, ContextCache(identity), cache.select([1])
    tokens = generate(cepe, PROMPTS, stacked(caches), max_new_tokens=12, sampling=[HOT] * 3)
    for prompt, own, row in zip(PROMPTS, caches, tokens, strict=True):
        assert generate(cepe, [prompt], stacked([own]), max_new_tokens=12, sampling=HOT) == [row]


@pytest.mark.parametrize("step", [1, 100])
def test_the_bucket_changes_nothing(cepe, cache, monkeypatch, step):
    wanted = generate(cepe, PROMPTS, stacked([cache]), max_new_tokens=12, sampling=HOT)
    monkeypatch.setattr(module, "bucket", lambda count: -(-count // step) * step)
    memory = stacked([cache])
    assert memory.states_BME.shape[1] == {1: 236, 100: 300}[step]
    assert generate(cepe, PROMPTS, memory, max_new_tokens=12, sampling=HOT) == wanted


def test_another_length_is_no_other_program(cepe, cache):
    prompt = [[1, 2, 3]]
    generate(cepe, prompt, stacked([cache]), max_new_tokens=2)
    compiled = next_token._cache_size()
    generate(cepe, prompt, stacked([cache.drop([0])]), max_new_tokens=2)
    assert next_token._cache_size() == compiled


def test_algebra(cepe, identity, cache):
    """What is made of caches equals a fresh one of those passages."""
    both = cache.select([0, 1]) + cache.drop([0, 1])
    for made, order in (
        (cache.drop([1, 3]), [0, 2, 4]),
        (cache.select([4, 0, 0]), [4, 0, 0]),
        (cache.select([2]) + cache.select([2, 1]), [2, 2, 1]),
        (both, [0, 1, 2, 3, 4]),
        (cache.drop([]), [0, 1, 2, 3, 4]),
    ):
        # All passages, so that the encoder's batches are as large: others sum in another order on some CPUs.
        rest = [index for index in range(len(PASSAGES)) if index not in order]
        fresh = encode(cepe, [PASSAGES[index] for index in (*order, *rest)], identity, CHUNK)
        fresh = ContextCache(identity, fresh.passages[: len(order)])
        assert len(made) == len(fresh) == len(order)
        assert [passage.digest for passage in made.passages] == [passage.digest for passage in fresh.passages]
        ours, wanted = stacked([made]), stacked([fresh])
        assert relative_error(ours.states_BME, wanted.states_BME) < 1e-6
        np.testing.assert_array_equal(ours.valid_BM, wanted.valid_BM)
    for ours, wanted in zip(*(jax.tree.leaves(stacked([made])) for made in (both, cache)), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert len(cache) == 5


@pytest.fixture
def placed(monkeypatch):
    """Gets the number of tokens of every context that is put on the devices."""
    counts = []
    monkeypatch.setattr(module, "stacked", lambda caches: counts.append(caches[0].num_tokens) or stacked(caches))
    return counts


def test_two_contexts_in_turn_stay_on_the_devices(cache, placed):
    """A third one takes the place of the one that was read longest ago."""
    memories = DeviceMemories()
    contexts = [cache.select([index]) for index in range(3)]
    first, second = memories.of(contexts[0]), memories.of(contexts[1])
    for _ in range(3):
        assert memories.of(contexts[0]) is first
        assert memories.of(contexts[1]) is second
    assert placed == list(LENGTHS[:2])
    gone, stays = weakref.ref(first.states_BME), weakref.ref(second.states_BME)
    del first, second
    memories.of(contexts[2])
    assert gone() is None
    assert memories.of(contexts[1]).states_BME is stays()
    memories.of(contexts[0])
    assert placed == [*LENGTHS[:3], LENGTHS[0]]


def test_the_memory_of_a_context_goes_with_it(cache):
    memories, context = DeviceMemories(), cache.select([0])
    alive = weakref.ref(memories.of(context).states_BME)
    assert alive() is not None
    del context
    assert alive() is None


def test_no_context_is_the_plain_decoder(cepe, identity, decoder):
    nothing = encode(cepe, [], identity, CHUNK)
    assert (len(nothing), nothing.num_tokens, stacked([nothing])) == (0, 0, None)
    tokens = generate(cepe, PROMPTS, stacked([nothing]), max_new_tokens=12, sampling=HOT)
    assert tokens == generate(decoder, PROMPTS, max_new_tokens=12, sampling=HOT)


def test_a_passage_is_encoded_once(cepe, identity, cache, encoded):
    """Twice in one call, or known: by its tokens and the chunks' length."""
    first, second, third = PASSAGES[2], *make_passages(35, 38)
    twice = encode(cepe, [first, second, first], identity, CHUNK)
    assert sum(encoded) == 40 + 35
    assert twice.passages[0] is twice.passages[2]
    assert (len(twice), twice.num_tokens, twice.nbytes) == (3, 115, 75 * 16 * 4)
    encoded.clear()
    again = encode(cepe, [third, first, second], identity, CHUNK, known=twice + cache)
    assert encoded == [38]
    assert [len(passage.states_LE) for passage in again.passages] == [38, 40, 35]
    assert again.passages[2] is twice.passages[1]
    encoded.clear()
    assert encode(cepe, [first], identity, CHUNK, known=cache).passages[0] is cache.passages[2]
    assert encoded == []
    encode(cepe, [first], identity, CHUNK - 1, known=cache)
    assert sum(encoded) == 40


def test_batches(cepe, identity, cache, monkeypatch, caplog):
    """Of few shapes; whatever they hold, the states are the same. Progress counts real tokens."""
    shapes = []
    monkeypatch.setattr(module, "encode_chunks", lambda *given: shapes.append(given[1].shape) or encode_chunks(*given))
    passages = make_passages(*[40] * 11, *[20] * 3, 300, 90)
    at_once = encode(cepe, passages, identity, CHUNK)
    assert sorted(shapes) == [(1, 8, 32), (1, 32, 40)]
    shapes.clear()
    caplog.clear()
    monkeypatch.setattr(module, "BATCH_TOKENS", 200)
    for ours, wanted in zip(encode(cepe, passages, identity, CHUNK).passages, at_once.passages, strict=True):
        assert ours.digest == wanted.digest
        assert relative_error(ours.states_LE, wanted.states_LE) < 1e-5
    assert set(shapes) == {(1, 5, 40), (1, 6, 32)}
    assert "encode: 890 of 890" in caplog.text
    caplog.clear()
    encode(cepe, passages[:1], identity, CHUNK)
    assert not caplog.messages


@pytest.mark.parametrize("narrowed", [False, True], ids=["float32", "bfloat16"])
def test_disk(cepe, tmp_path, narrowed):
    """What is read has the bits that were written, and generates the same."""
    model = narrow(cepe) if narrowed else cepe
    identity, path = encoder_identity(model, TOKENIZER), tmp_path / "contexts.safetensors"
    written = encode(model, [*PASSAGES, PASSAGES[1]], identity, CHUNK)
    assert written.passages[0].states_LE.dtype == jnp.dtype(identity["dtype"])
    written.save(path)
    read = ContextCache.load(path, identity)
    assert read.identity == identity
    assert [passage.digest for passage in read.passages] == [passage.digest for passage in written.passages]
    for ours, wanted in zip(read.passages, written.passages, strict=True):
        assert ours.states_LE.dtype == wanted.states_LE.dtype
        np.testing.assert_array_equal(ours.states_LE.view(np.uint8), wanted.states_LE.view(np.uint8))
    memory, limits = stacked([written]), {"max_new_tokens": 8, "sampling": HOT}
    assert memory.states_BME.dtype == jnp.dtype(identity["dtype"])
    assert generate(model, PROMPTS, stacked([read]), **limits) == generate(model, PROMPTS, memory, **limits)
    written.select([1]).save(path)  # over the old one
    assert len(ContextCache.load(str(path), identity)) == 1
    ContextCache(identity).save(path)
    assert len(ContextCache.load(path, identity)) == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_every_flipped_byte_is_seen(cache, identity, tmp_path):
    """One line, wherever it is: in the header, the names, the identity or the data."""
    path = tmp_path / "contexts"
    cache.select([1]).save(path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=f"^{path} is (damaged|not .*whole|no file)") as error:
            ContextCache.load(path, identity)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert ContextCache.load(path, identity).num_tokens == 3


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_files(cache, identity, tmp_path, kept):
    path = tmp_path / "contexts"
    cache.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"^{path} .*whole .*encode"):
        ContextCache.load(path, identity)


def test_files_of_other_kinds(identity, tmp_path):
    save_file({"embed": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is no file .*contexts"):
        ContextCache.load(tmp_path / "model.safetensors", identity)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no .*contexts"):
            ContextCache.load(path, identity)


FACTS = [  # of a file with a right digest; words of the refusal
    (lambda facts: [], "a list of 0"),
    (lambda facts: {}, "missing required field identity"),
    (lambda facts: facts | {"identity": {"dtype": 5}}, "expected str, got int"),
    (lambda facts: facts | {"passages": 3}, "passages is 3"),
    (lambda facts: facts | {"passages": ["x"]}, "1 passages"),
    (lambda facts: facts | {"passages": []}, "0 passages"),
    (lambda facts: facts | {"chunks": []}, "1 passages"),
    (lambda facts: facts | {"chunks": [[1]]}, "array of length 2"),
    (lambda facts: facts | {"chunks": [[-1, 0]]}, "expected int >= 0"),
    (lambda facts: facts | {"other": 1}, "unknown key other"),
]


@pytest.mark.parametrize(("change", "words"), FACTS)
def test_crafted_facts(cache, identity, tmp_path, change, words):
    path, states = tmp_path / "contexts", cache.select([1])._states()
    cache.select([1]).save(path)
    with module.safe_open(path, "np") as file:
        facts = json.dumps(change(json.loads(file.metadata()["facts"])))
    module.save_tensors(states, path, {"facts": facts, "sha256": module._sha256(facts, states)})
    with pytest.raises(ValueError, match=f"^{path}.*{words}") as error:
        ContextCache.load(path, identity)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["encoder", "tokenizer", "dtype"])
def test_foreign_contexts(cepe, cache, identity, tmp_path, key):
    """Refused wherever they come from, and what differs is named."""
    other = identity | {key: "another"}
    cache.save(tmp_path / "contexts")
    said = rf".*another {key} \({identity[key]}, not another\).*"
    with pytest.raises(ValueError, match=f"^{tmp_path / 'contexts'} {said}$"):
        ContextCache.load(tmp_path / "contexts", other)
    with pytest.raises(ValueError, match=f"^the known context {said}$"):
        encode(cepe, PASSAGES[:1], other, CHUNK, known=cache)
    with pytest.raises(ValueError, match=f"^the second context {said}$"):
        ContextCache(other) + cache
    with pytest.raises(ValueError, match=f"^context 1 {said}$"):
        stacked([ContextCache(other), cache])


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(cache, identity, tmp_path, monkeypatch, error):
    path = tmp_path / "contexts"
    cache.select([1]).save(path)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(module, "save_tensors", fail)
    with pytest.raises(type(error)):
        cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len(ContextCache.load(path, identity)) == 1


def test_what_a_killed_write_leaves_is_removed(cache, identity, tmp_path, monkeypatch):
    """The temporary file of safetensors too: it lies in a directory of the writer's."""
    path, places = tmp_path / "contexts", []
    save_tensors = module.save_tensors

    def noted(tensors, path, metadata):
        places.append(path)
        save_tensors(tensors, path, metadata)

    monkeypatch.setattr(module, "save_tensors", noted)
    cache.save(path)
    (place,) = places
    place.parent.mkdir()
    (place.parent / ".tmpABC").touch()
    cache.save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_contexts_are_added_to_those_of_another(cache, identity, tmp_path):
    """Each passage once; a second writer at the same moment is refused."""
    path = tmp_path / "contexts"
    cache.select([0, 1]).add_to(path)
    cache.select([2, 1, 2]).add_to(path)
    assert [passage.digest for passage in ContextCache.load(path, identity).passages] == [
        passage.digest for passage in cache.passages[:3]
    ]
    with one_writer_of(path), pytest.raises(ValueError, match="contexts is being written by process"):
        cache.add_to(path)


def test_identity(cepe, identity, tmp_path):
    """Another weight, another number that the encoder computes with, dtype or tokenizer; not how it is computed."""

    def with_encoder(encoder) -> dict[str, str]:
        return encoder_identity(Cepe(cepe.decoder, encoder, cepe.cross), TOKENIZER)

    def differing(other: dict[str, str]) -> set[str]:
        return {key for key in identity if other[key] != identity[key]}

    save(cepe, tmp_path / "model")
    assert encoder_identity(load(tmp_path / "model"), TOKENIZER) == identity
    assert with_encoder(computed(cepe.encoder, remat="full", mlp_chunk=4)) == identity
    scale = cepe.encoder.norm.scale[...]
    assert differing(with_encoder(with_leaf(cepe.encoder, "norm.scale", scale.at[3].add(1e-6)))) == {"encoder"}
    assert differing(with_encoder(with_config(cepe.encoder, norm_eps=2e-3))) == {"encoder"}
    rope = dataclasses.replace(ENCODER.rope, theta=101.0)
    assert differing(with_encoder(with_config(cepe.encoder, rope=rope))) == {"encoder"}
    assert differing(with_encoder(computed(cepe.encoder, dtype="bfloat16"))) == {"dtype"}
    assert differing(encoder_identity(cepe, SimpleNamespace(fingerprint=lambda: "other"))) == {"tokenizer"}


@pytest.mark.parametrize(
    ("passages", "said"),
    [
        ([[1, 2], []], "passage 1 .*no tokens"),
        ([[1, 2], [3, 65]], "passage 1 .* 65, .*vocabulary .* 65: "),
        ([[1.5]], r"passage 0 .*float64\[1\]: .*integers"),
    ],
)
def test_bad_passages(cepe, identity, encoded, passages, said):
    with pytest.raises(ValueError, match=said):
        encode(cepe, passages, identity, CHUNK)
    assert encoded == []


def test_bad_calls(cepe, decoder, identity, cache):
    with pytest.raises(ValueError, match="context .*CEPE .*plain decoder"):
        encode(decoder, PASSAGES, identity, CHUNK)
    with pytest.raises(ValueError, match="chunk_length is 0"):
        encode(cepe, PASSAGES, identity, 0)
    for call in (cache.select, cache.drop):
        for index in (5, -1):
            with pytest.raises(ValueError, match=f"no passage {index}: .* 5, .* 0"):
                call([0, index])


def test_more_than_fits(cepe, cache, identity, encoded, monkeypatch):
    """Said before anything is encoded, with what would fit, and that does."""
    token = 16 * 4  # bytes
    monkeypatch.setattr(module, "free_bytes", lambda: 700 * token)
    said = "^1 x 701 tokens .* 0.00 GiB .* 0.00 GiB .*: {} would fit"
    with pytest.raises(ValueError, match=said.format(128)):  # the host has three copies, and 233 is between two buckets
        encode(cepe, make_passages(701), identity, CHUNK)
    assert encoded == []
    fitting = encode(cepe, make_passages(128), identity, CHUNK)
    many = fitting.select([0] * 6)
    with pytest.raises(ValueError, match="^1 x 768 tokens .*: 256 would fit"):
        stacked([many])
    with pytest.raises(ValueError, match="^2 x 256 tokens .*: 128 would fit"):
        stacked([many.select([0, 1])] * 2)
    assert stacked([many.select([0, 1])]).states_BME.shape == (1, 256, 16)
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    assert stacked([encode(cepe, [], identity, CHUNK)]) is None
    assert many.select([0]) is not fitting


def test_free_bytes():
    """Of this machine: not all of it, and not next to nothing."""
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert everything / 100 < free_bytes() < everything


MESHES = {"memory": 8}, {"data": 2, "memory": 4}, {"memory": 4, "tensor": 2}, {"fsdp": 4, "memory": 2}


def test_meshes():
    """On 8 devices: the states, tokens and scores of one; memory is cut over `context`; encoding does not communicate.

    Two prompts, and the one of a score, do not divide by four devices of the batch.

    30 CPU-seconds of compiling for four meshes of 8 devices: each has collectives and placements of its own.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for mesh, result in zip(MESHES, results, strict=True):
        assert result["error"] < 1e-5, f"{mesh} {result}"
        assert result["tokens"] == result["wanted"], f"{mesh} {result}"
        assert result["a device's tokens"] == 256 // mesh["memory"]
        rows = mesh.get("data", mesh.get("fsdp", 1))
        assert result["shapes"][0] == [rows, 8 // rows, CHUNK], f"{mesh} {result}"  # five chunks and three of padding
        assert result["chunks of a device"] == 1
        assert result["compiled"] == 2, f"{mesh} {result}"  # prefill and decode
        cut = bool({"tensor", "fsdp"} & mesh.keys())  # the weights are
        assert bool(result["collectives"]) == cut, f"{mesh} {result}"
        assert abs(result["score"]) < 1e-4
        if {"data", "tensor"} & mesh.keys():
            assert result["policies"] == [True, True, "tensor" not in mesh], f"{mesh} {result}"
            heads = DECODER.num_kv_heads // mesh.get("tensor", 1)
            assert result["a device's rolling cache"] == [DECODER.num_layers, 2 // rows, 6, heads, DECODER.head_dim]
    assert "6 devices of mesh.context" in done.stderr


COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    cepe, identity, prompts = make_cepe(), {"encoder": "the tiny one"}, PROMPTS[:2]
    alone = encode(cepe, PASSAGES, identity, CHUNK)
    wanted = generate(cepe, prompts, stacked([alone]), max_new_tokens=8, sampling=HOT)
    policies = (
        Rolling(window=6, sinks=2),
        ReAttention(sinks=1, recent=3, top_k=1, selected=1, span=2, piece=3),
        Razor(sinks=1, recent=2, compression=4, heads=((0, 1), (2, 0), (2, 1))),
    )
    given = {"max_new_tokens": 8, "sampling": HOT}
    wanted_of = [generate(cepe, prompts, stacked([alone]), policy=policy, **given) for policy in policies]
    (scored,), shapes = score(cepe, prompts[0], [[5, 6]], stacked([alone])), []
    module.encode_chunks = lambda *given: shapes.append(given[1].shape) or encode_chunks(*given)
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        shapes.clear()
        with jax.set_mesh(mesh):
            model = jax.device_put(cepe, shardings_of(cepe, mesh))
            cache = encode(model, PASSAGES, identity, CHUNK)
            memory = stacked([cache])
            already = next_token._cache_size()
            tokens = generate(model, prompts, memory, max_new_tokens=8, sampling=HOT)
            compiled = next_token._cache_size() - already
            shape = sizes.get("data", 1), sizes["memory"], CHUNK
            chunks = np.zeros(shape, np.int32), np.ones(shape, bool)
            program = encode_chunks.lower(model, *chunks).compile()
            states = np.concatenate([passage.states_LE for passage in cache.passages])
            result = {
                "error": relative_error(states, np.concatenate([p.states_LE for p in alone.passages])),
                "shapes": shapes,
                "tokens": tokens,
                "wanted": wanted,
                "score": score(model, prompts[0], [[5, 6]], memory)[0].total - scored.total,
                "a device's tokens": memory.states_BME.addressable_shards[0].data.shape[1],
                "chunks of a device": encode_chunks(model, *chunks).addressable_shards[0].data.shape[1] // CHUNK,
                "compiled": compiled,
                "collectives": [kind for kind in COLLECTIVES if kind in program.as_text()],
            }
            if {"data", "tensor"} & sizes.keys():
                cache = new_cache(model.decoder, policies[0], 2, 0)
                result["policies"] = []
                for policy, tokens in zip(policies, wanted_of, strict=True):
                    try:
                        same = generate(model, prompts, memory, policy=policy, **given) == tokens
                    except ValueError as error:  # Razor's, where devices share heads
                        same = "mesh.tensor 1" not in str(error)
                    result["policies"].append(same)
                result["a device's rolling cache"] = cache.k_ZBSKH.addressable_shards[0].data.shape
            print(json.dumps(result))
    with jax.set_mesh(make_mesh(memory=6, devices=jax.devices()[:6])):
        try:
            stacked([alone])
        except ValueError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
