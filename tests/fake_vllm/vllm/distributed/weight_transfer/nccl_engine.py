"""What the trainer says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    rank: int = field(kw_only=True)
