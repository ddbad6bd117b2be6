"""The oracle in PyTorch gives the reference's numbers, and so does what stands beside it in a benchmark."""

from pathlib import Path

import numpy as np
import pytest
from support.models import relative_error

from cepe_jax.weights.source import load

torch = pytest.importorskip("torch")
from support.torch_cepe import Reader, copy_of, train_step  # noqa: E402 (needs torch)

GOLDEN = Path(__file__).parent / "golden"


def read(name: str, file: str = "expected.npz"):
    return load(GOLDEN / name), dict(np.load(GOLDEN / name / file))


@pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_last2"])
def test_logits_greedy_tokens_and_gradients_are_the_references(name):
    model, golden = read(name)
    oracle = copy_of(model)
    tokens, context = (torch.tensor(golden[key]).long() for key in ("input_ids", "encoder_input_ids"))
    mask = torch.tensor(golden["encoder_attention_mask"]).bool()
    logits_BTV = oracle(tokens, context, mask)
    assert relative_error(logits_BTV.detach(), golden["logits"]) < 1e-5
    assert relative_error(oracle(tokens, context).detach(), golden["logits_no_padding"]) < 1e-5
    assert relative_error(oracle(tokens).detach(), golden["logits_no_context"]) < 1e-5
    labels = torch.tensor(golden["labels"])[:, 1:].flatten().long()
    loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels)
    assert loss.item() == pytest.approx(float(golden["loss_lm"]), rel=1e-5)
    loss.backward()
    ours = {key: weight.grad for key, weight in oracle.named_parameters() if weight.requires_grad}
    theirs = {key.removeprefix("grad_lm/"): x for key, x in golden.items() if key.startswith("grad_lm/")}
    assert set(ours) == set(theirs)
    for key, grad in theirs.items():
        assert relative_error(ours[key], grad) < 1e-4, key


def test_edge():
    """Linear scaling, the two norms' eps, an encoder wider than the decoder, masks with holes."""
    model, golden = read("tiny_edge")
    oracle = copy_of(model)
    tokens, context = (torch.tensor(golden[key]).long() for key in ("input_ids", "encoder_input_ids"))
    with torch.no_grad():
        assert relative_error(oracle(tokens, context), golden["logits"]) < 1e-5
        for case in ("holes", "absent"):
            mask = torch.tensor(golden[f"mask_{case}"]).bool()
            assert relative_error(oracle(tokens, context, mask), golden[f"logits_{case}"]) < 1e-5


@pytest.mark.parametrize("kept", [False, True])
def test_a_cache_and_kept_keys_give_the_same_tokens(kept):
    model, golden = read("tiny_mha")
    reader = Reader(model, golden["encoder_input_ids"], golden["input_ids"])
    memory = reader.oracle.encode(reader.context_BCL, torch.tensor(golden["encoder_attention_mask"]).bool())
    first = reader.start(reader.oracle.keep(memory) if kept else memory)
    found = torch.cat([first, *(reader.next_token() for _ in range(7))], dim=1)
    assert np.array_equal(found, golden["greedy"])


def test_a_step_takes_the_loss_down():
    model, golden = read("tiny_mha")
    mask = golden["encoder_attention_mask"].astype(bool)
    labels = np.pad(golden["labels"][:, 1:], [(0, 0), (0, 1)], constant_values=-100)
    batch = {"tokens": golden["input_ids"], "context": golden["encoder_input_ids"], "context_mask": mask}
    step = train_step(model, batch | {"labels": labels}, 1e-3, 1.0)
    first, second = step(), step()
    assert first == pytest.approx(float(golden["loss_lm"]), rel=1e-5)
    assert second < first
