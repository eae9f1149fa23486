"""A batch for a Hugging Face model, sharded: labels are shifted first, positions count from the document's start."""

import pytest
import torch

from longctx.integrations.huggingface_batch import rows_of, shard_batch
from longctx.loss import IGNORED
from longctx.parallel.layout import Layout

ONE = Layout("contiguous", 1)


def test_shard_batch_shifts_before_it_shards():
    input_ids = torch.arange(10, 18)[None]
    layout = Layout("zigzag", 2)
    first, second = (shard_batch(input_ids, layout=layout, rank=rank, cu_seqlens=(0, 3, 8)) for rank in range(2))
    assert first.inputs["input_ids"].tolist() == [[10, 11, 16, 17]]
    assert first.labels.tolist() == [[11, 12, 17, IGNORED]]
    assert first.inputs["position_ids"].tolist() == [[0, 1, 3, 4]]
    assert second.inputs["input_ids"].tolist() == [[12, 13, 14, 15]]
    assert second.labels.tolist() == [[IGNORED, 14, 15, 16]]
    assert second.inputs["position_ids"].tolist() == [[2, 0, 1, 2]]
    assert first.label_count == second.label_count == 6


def test_shard_batch_refuses_what_does_not_fit():
    input_ids = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels must be"):
        shard_batch(input_ids, input_ids[:1], layout=ONE, rank=0)
    with pytest.raises(ValueError, match="one per row; given 3 for a batch of 2"):
        shard_batch(input_ids, layout=ONE, rank=0, cu_seqlens=[[0, 8]] * 3)
    with pytest.raises(ValueError, match="strictly upwards from 0 to 8"):
        shard_batch(input_ids, layout=ONE, rank=0, cu_seqlens=[0, 4])
    with pytest.raises(ValueError, match="cannot be divided"):
        shard_batch(input_ids, layout=Layout("zigzag", 3), rank=0)


def test_cu_seqlens_are_for_all_rows_or_for_each():
    assert rows_of(None) == ()
    assert rows_of([0, 3, 8]) == rows_of(torch.tensor([0, 3, 8])) == ((0, 3, 8),)
    assert rows_of([[0, 8], (0, 3, 8)]) == ((0, 8), (0, 3, 8))
    for wrong in ([], [0, [0, 8]]):
        with pytest.raises(ValueError, match="cu_seqlens must be numbers, or a list of numbers per row"):
            rows_of(wrong)
