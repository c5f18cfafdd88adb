"""What the ranks of a training share among themselves, and what they leave outside of the device's memory."""

from dataclasses import dataclass, fields
from typing import Any, Literal

Offload = Literal["none", "cpu", "nvme"]
_OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Changes memory and speed, never a result.

    zero_stage: what each rank holds only a share of: nothing (0), the optimizer and fp32 masters (1), gradients too (2),
    weights too (3).

    gradient_exchange: "step" lets gradients add up on every rank and exchanges them between ranks once, with the last
    backward of a step: the least traffic, for one gradient per weight, in fp32, on every rank. "micro_batch" (stages 2
    and 3) exchanges at every backward, so that a rank holds its share alone: as much memory less as traffic more. A step
    of a single backward is the same with both, and needs the memory of "micro_batch".

    offload_optimizer: optimizer state and masters in the host's memory ("cpu", stages 1 to 3) or on disk ("nvme", stage
    3), where AdamW then runs on the CPU. offload_parameters: weights too (stage 3). nvme_path: a folder on a fast local
    disk, for "nvme".
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    gradient_exchange: Literal["step", "micro_batch"] = "step"
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage {self.zero_stage!r} must be 0, 1, 2 or 3")
        if self.gradient_exchange not in ("step", "micro_batch"):
            raise ValueError(f"gradient_exchange {self.gradient_exchange!r} must be 'step' or 'micro_batch'")
        if self.gradient_exchange == "micro_batch" and self.zero_stage < 2:
            raise ValueError(
                f"gradient_exchange 'micro_batch' at zero_stage {self.zero_stage} saves no memory, as every rank holds "
                "the whole gradient there: set zero_stage 2 or 3, or 'step'"
            )
        for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            device = getattr(self, name)
            if device not in _OFFLOADS:
                raise ValueError(f"{name} {device!r} must be 'none', 'cpu' or 'nvme'")
            least = 3 if device == "nvme" else least
            if device != "none" and self.zero_stage < least:
                raise ValueError(f"{name} {device!r} needs zero_stage {least} or more, not {self.zero_stage}")
        if self.offload_parameters != "none" and self.offload_optimizer == "none":
            raise ValueError(
                f"offload_parameters {self.offload_parameters!r} leaves the larger part, the optimizer, on the device: "
                "set offload_optimizer too"
            )
        on_disk = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if on_disk != (self.nvme_path is not None):
            raise ValueError(f"nvme_path {self.nvme_path!r} and an offload to 'nvme' need each other")

    def shared(self) -> dict[str, Any]:
        """These fields alone, for another configuration that has them."""
        return {field.name: getattr(self, field.name) for field in fields(ZeroConfig)}
