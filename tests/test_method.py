"""The model against the method in fp64 numpy."""

import numpy as np
import pytest
from support.models import float64, relative_error
from support.oracles import NONE, method


@pytest.mark.parametrize("case", ["all real", "holes, padding and an absent chunk", "no context", "all masked"])
@pytest.mark.parametrize("left_padded", [False, True], ids=["full rows", "left-padded rows"])
def test_logits_are_the_methods(
    case, left_padded, cepe, forward, tokens_BT, context_BCL, context_mask_BCL, token_mask_BT
):
    context, mask, given = {
        "all real": (context_BCL, np.ones_like(context_mask_BCL), (context_BCL, None)),
        "holes, padding and an absent chunk": (context_BCL, context_mask_BCL, (context_BCL, context_mask_BCL)),
        "no context": (NONE, NONE.astype(bool), (None, None)),
        "all masked": (NONE, NONE.astype(bool), (context_BCL, np.zeros_like(context_mask_BCL))),
    }[case]
    keep_BT = token_mask_BT if left_padded else np.ones_like(token_mask_BT)
    ours = np.asarray(forward(cepe, tokens_BT, *given, token_mask_BT if left_padded else None))
    assert ours.dtype == np.float32
    weights = float64(cepe)
    for row, keep in enumerate(keep_BT):
        wanted = method(weights, cepe.config, tokens_BT[row, keep], context[row], mask[row])
        assert relative_error(ours[row, keep], wanted) < 1e-5
