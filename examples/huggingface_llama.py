"""Train a tiny Hugging Face Llama whose sequences are shared between ranks; its code is not changed.

    torchrun --nproc-per-node 2 examples/huggingface_llama.py

Packed documents of bytes, striped ring attention over all ranks. The losses do not depend on the number of ranks.
Needs `pip install -e ".[huggingface]"`; takes seconds on two CPU cores.
"""

import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from longctx.integrations.huggingface import context_parallel
from longctx.integrations.huggingface_batch import shard_batch
from longctx.loss import token_loss_sum
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import init_distributed, read_launch

STEPS, BATCH, TOTAL, LEARNING_RATE = 20, 2, 1024, 3e-3


def packed_documents(generator: torch.Generator) -> tuple[torch.Tensor, list[list[int]]]:
    """Cut rows of TOTAL bytes out of a source file; each row holds documents of random lengths."""
    text = torch.frombuffer(bytearray(Path(textwrap.__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(0, len(text) - TOTAL, (BATCH,), generator=generator).tolist()
    cuts = [torch.randperm(TOTAL - 1, generator=generator)[:4].add(1).sort().values.tolist() for _ in starts]
    return torch.stack([text[start : start + TOTAL] for start in starts]), [[0, *cut, TOTAL] for cut in cuts]


def main() -> None:
    launch = read_launch()
    device = init_distributed(launch)
    group, size = dist.group.WORLD, launch.world_size  # all ranks share each sequence: no data parallelism here
    layout = Layout("striped", size)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="longctx").to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)  # the same batch on every rank

    for step in range(1, STEPS + 1):
        input_ids, cu_seqlens = packed_documents(generator)
        shard = shard_batch(input_ids.to(device), layout=layout, rank=launch.rank, cu_seqlens=cu_seqlens)
        with context_parallel(layout=layout, group=group, schedule="ring", cu_seqlens=cu_seqlens):
            logits = model(**shard.inputs).logits
        loss = token_loss_sum(logits, shard.labels) / shard.label_count  # this rank's part of the mean over all labels
        (loss * size).backward()  # DDP averages gradients over ranks; their sum is wanted
        optimizer.step()
        optimizer.zero_grad()

        loss = loss.detach()
        dist.all_reduce(loss)
        if launch.rank == 0:
            print(f"step {step:3d}   loss {loss.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
