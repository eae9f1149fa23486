"""Selections that are given as tables of blocks, with the names of flex_attention's BlockMask."""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection, selected_blocks


def from_block_table(
    kv_num_blocks: Tensor, kv_indices: Tensor, *, block_size: int, positions: Tensor, first: Tensor
) -> Selection:
    """Return the selection of a table: the queries of block n see the blocks `kv_indices[..., n, :kv_num_blocks]`.

    Of a block they see what is in their document and not after themselves: a table needs no `mask_mod` for that, and
    there is no difference between full and partial blocks. (A BlockMask lists them apart: join its two tables.)

    Args:
        kv_num_blocks: int32 or int64 `[R, HS, NQ]`, how many blocks the queries of each block see.
        kv_indices: int32 or int64 `[R, HS, NQ, K]`, which; what is behind the first `kv_num_blocks` is not read.
        block_size: tokens of a block, of queries and of keys.
        positions: int64 `[T]`, of the queries.
        first: int64 `[R, T]` or `[1, T]`, the first position of each query's document.

    Raises:
        ValueError: shapes that do not fit, a count above K, a block that is out of range or listed twice.
    """
    _check_shapes(kv_num_blocks, kv_indices, block_size=block_size, positions=positions, first=first)
    rows = kv_indices.shape[2]
    needed = int(positions.max()) // block_size + 1 if len(positions) else 0
    if needed > rows:
        raise ValueError(
            f"the table has {rows} blocks of queries of {block_size} tokens; the positions need {needed}: give a table "
            "of the whole sequence, or the block_size that it was made with"
        )
    width = kv_indices.shape[3]
    if bool(((kv_num_blocks < 0) | (kv_num_blocks > width)).any()):
        raise ValueError(
            f"kv_num_blocks must be 0 to {width}, the last size of kv_indices; given "
            f"{int(kv_num_blocks.min())} to {int(kv_num_blocks.max())}"
        )
    listed = torch.arange(width, device=kv_indices.device) < kv_num_blocks[..., None]
    if bool((listed & ((kv_indices < 0) | (kv_indices >= rows))).any()):
        wrong = kv_indices[listed & ((kv_indices < 0) | (kv_indices >= rows))][0]
        raise ValueError(f"kv_indices must be 0 to {rows - 1}, the blocks of the table; given {int(wrong)}")
    blocks = torch.where(listed, kv_indices, -1).to(torch.int64)
    in_order = blocks.sort(dim=-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)
    if bool(twice.any()):
        row, head, query, _ = twice.nonzero()[0].tolist()
        raise ValueError(
            f"kv_indices lists block {int(in_order[..., 1:][twice][0])} twice for queries of block {query} (row {row}, "
            f"head {head}); list each once"
        )
    of_queries = blocks[:, :, positions // block_size].permute(0, 2, 1, 3)  # [R, T, HS, K]
    of_queries = of_queries.expand(max(len(blocks), len(first)), -1, -1, -1)
    return selected_blocks(of_queries, block_size=block_size, positions=positions, first=first)


def _check_shapes(
    kv_num_blocks: Tensor, kv_indices: Tensor, *, block_size: int, positions: Tensor, first: Tensor
) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1; given {block_size}")
    if kv_indices.dim() != 4 or kv_num_blocks.shape != kv_indices.shape[:3]:
        raise ValueError(
            "need kv_num_blocks [R, HS, NQ] and kv_indices [R, HS, NQ, K]; given "
            f"{list(kv_num_blocks.shape)} and {list(kv_indices.shape)}"
        )
    for name, x in (("kv_num_blocks", kv_num_blocks), ("kv_indices", kv_indices)):
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64; given {x.dtype}")
    rows = kv_indices.shape[0]
    if positions.dim() != 1 or first.dim() != 2 or first.shape[1] != len(positions):
        raise ValueError(
            f"need positions [T] and first [R, T] or [1, T]; given {list(positions.shape)} and {list(first.shape)}"
        )
    if first.shape[0] != rows and 1 not in (first.shape[0], rows):
        raise ValueError(f"the table has {rows} rows, first has {first.shape[0]}: give as many, or one for all")
