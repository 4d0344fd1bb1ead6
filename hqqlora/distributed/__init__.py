"""Quantized models on several devices, by torch.distributed."""

from hqqlora.distributed.full_state import full_state_dict
from hqqlora.distributed.load import load_sharded
from hqqlora.distributed.sharding import shard_model
from hqqlora.distributed.skeleton import quantized_skeleton
from hqqlora.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = [
    "ColwiseParallel",
    "RowwiseParallel",
    "full_state_dict",
    "load_sharded",
    "quantized_skeleton",
    "shard_model",
]
