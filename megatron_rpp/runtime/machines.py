"""GPUs that a run can be planned for: figures of NVIDIA's data sheets, dense and without sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU, and its links in a node of eight."""

    memory: float
    """Bytes."""
    bf16_flops: float
    fp32_flops: float
    """FLOP/s of matrix products of that precision."""
    bandwidth: float
    """Bytes/s of its own memory."""
    node_link: float
    """Bytes/s to other GPUs of the node (NVLink), each way."""
    network: float
    """Bytes/s to other nodes, each way: a network card of 400 Gbit/s for each GPU."""
    host_link: float
    """Bytes/s to the host's memory (PCIe), each way."""
    per_node: int = 8

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


MACHINES = {
    "h100": Machine(
        memory=80e9, bf16_flops=989.4e12, fp32_flops=66.9e12, bandwidth=3.35e12,
        node_link=450e9, network=50e9, host_link=55e9,
    ),
    "h200": Machine(
        memory=141e9, bf16_flops=989.4e12, fp32_flops=66.9e12, bandwidth=4.8e12,
        node_link=450e9, network=50e9, host_link=55e9,
    ),
    "b200": Machine(
        memory=180e9, bf16_flops=2250e12, fp32_flops=75e12, bandwidth=7.7e12,
        node_link=900e9, network=50e9, host_link=55e9,
    ),
}  # fmt: skip
