"""Mask functions of transformers, read as bands, say what transformers evaluates."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils

from longctx.integrations.huggingface_mask import read_mask_function


def seen_by(pattern, total: int) -> torch.Tensor:
    positions = torch.arange(total)
    return pattern.mask.allowed(positions, positions)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(masking_utils.causal_mask_function, id="causal"),
        pytest.param(masking_utils.bidirectional_mask_function, id="bidirectional"),
        pytest.param(masking_utils.sliding_window_causal_mask_function(4), id="window"),
        pytest.param(masking_utils.sliding_window_bidirectional_mask_function(3), id="window-both-ways"),
        pytest.param(
            masking_utils.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.int64)),
            id="chunked",
        ),
    ],
)
def test_mask_functions_are_read_as_transformers_evaluates_them(function):
    rows, columns = torch.arange(13)[:, None], torch.arange(13)[None, :]
    wanted = function(0, 0, rows, columns).expand(13, 13)
    assert torch.equal(seen_by(read_mask_function(function), 13), wanted)


def test_unknown_mask_functions_are_refused():
    either = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    with pytest.raises(ValueError, match="does not know the mask function 'or_masks"):
        read_mask_function(masking_utils.and_masks(masking_utils.causal_mask_function, either))
