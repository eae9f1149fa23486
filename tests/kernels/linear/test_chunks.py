"""The grid of chunks by literal values."""

import torch

from longctx.kernels.linear.chunks import Block, Chunks, chunks_of
from longctx.kernels.linear.contract import Cuts


def test_segments_are_cut_evenly() -> None:
    assert chunks_of(Cuts(lengths=(100,)), 64, power_of_two=False) == Chunks(size=50, lengths=(100,))
    assert chunks_of(Cuts(lengths=(1, 1)), 64, power_of_two=False).size == 1
    assert chunks_of(Cuts(lengths=(100,)), 64, power_of_two=True).size == 64
    assert chunks_of(Cuts(lengths=(33, 3)), 64, power_of_two=True).size == 64
    assert chunks_of(Cuts(lengths=(16, 16)), 64, power_of_two=True).size == 16


def test_split_fills_up_every_segment_and_join_takes_it_away() -> None:
    chunks = Chunks(size=3, lengths=(4, 1, 3))
    x = torch.arange(1, 9)[None]
    assert chunks.split(x).tolist() == [[[1, 2, 3], [4, 0, 0], [5, 0, 0], [6, 7, 8]]]
    assert chunks.split(x, last=True).tolist() == [[[1, 2, 3], [4, 4, 4], [5, 5, 5], [6, 7, 8]]]
    assert chunks.join(chunks.split(x)).tolist() == x.tolist()
    tokens = chunks.tokens(x.device)
    assert tokens is not None and tokens.tolist() == [3, 1, 1, 3]


def test_nothing_is_copied_where_nothing_is_filled_up() -> None:
    chunks, x = Chunks(size=3, lengths=(6, 3)), torch.zeros(2, 9, 4)
    assert chunks.split(x).data_ptr() == x.data_ptr()
    assert chunks.join(chunks.split(x)).data_ptr() == x.data_ptr()
    assert chunks.tokens(x.device) is None


def test_blocks_are_parts_of_one_segment_or_whole_equal_ones() -> None:
    chunks = Chunks(size=4, lengths=(9, 9, 3, 4, 4, 40))  # 3 3 1 1 1 10 chunks
    assert chunks.blocks(6) == [
        Block(0, 6, (0, 2), True, True),
        Block(6, 9, (2, 5), True, True),
        Block(9, 15, (5, 6), True, False),
        Block(15, 19, (5, 6), False, True),
    ]
