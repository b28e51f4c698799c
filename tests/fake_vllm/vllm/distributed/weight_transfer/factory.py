"""The trainer's end of the weight transfer; here queues to the servers' threads instead of NCCL."""

from __future__ import annotations

import queue
from typing import Any

from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

GROUP: dict[int, queue.Queue[Any]] = {}
"""What each server has been sent, by the rank of its first worker."""


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: Any) -> TrainerEngine:
        assert init_info.rank == 0 and init_info.master_address and init_info.packed
        GROUP.clear()
        shown = {"master_address": init_info.master_address, "master_port": init_info.master_port, "rank_offset": 1}
        client.init_weight_transfer_engine({**shown, "world_size": init_info.world_size, "packed": True})
        assert len(GROUP) == init_info.world_size - 1  # all have joined, each with one worker
        return TrainerEngine(client, source)


class TrainerEngine:
    """Sends what the source gives; names, types and shapes must be those that it has declared."""

    def __init__(self, client: Any, source: Any) -> None:
        self.client, self.source = client, source

    def send_weights(self) -> None:
        told = self.source.metadata()
        self.client.start_weight_update()
        for given, (name, value) in zip(told, self.source, strict=True):
            assert (given.name, given.dtype, given.shape) == (name, value.dtype, tuple(value.shape))
            for each in GROUP.values():
                each.put(value.detach().clone())
        shown = {"names": [each.name for each in told], "shapes": [list(each.shape) for each in told]}
        self.client.update_weights({**shown, "dtype_names": [str(each.dtype).removeprefix("torch.") for each in told]})
        self.client.finish_weight_update()
