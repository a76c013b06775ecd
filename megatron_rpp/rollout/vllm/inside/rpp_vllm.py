"""Runs inside vLLM's workers: ways for new weights to come in, and log-probs at the temperature.

A server imports it for `--worker-extension-cls rpp_vllm.Extension`, in vLLM's environment, so it
imports nothing of the project. It registers three backends of vLLM's weight-transfer API, whose
other sides are in `megatron_rpp/rollout/vllm`:

    rpp_shared   safetensors files that both sides see
    rpp_nccl     buckets of tensors, broadcast by the trainer's first rank
    rpp_ipc      buckets of tensors in the memory of the same GPU

In all of them the model's own loader takes this worker's tensor-parallel part, and `update_weights`
raises if the last part of an update leaves any parameter without new values. (vLLM only warns. If
`finish_weight_update` raised, no further update could start.)
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import (
    PackedBufferImporter,
    packed_ipc_consumer,
    unpack_tensor,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.sample.sampler import Sampler

_LOWEST = 1e-5
"""Temperatures below it mean greedy decoding to vLLM."""


class _Checked(WeightTransferEngine):
    """What the backends share: an update session that must fill every parameter."""

    init_info_cls = WeightTransferInitInfo
    is_open = False
    """Whether the model's parameters are being replaced."""

    def init_transfer_engine(self, init_info):
        """Nothing to agree on."""

    def shutdown(self):
        """Nothing to release."""

    def start_weight_update(self):
        # Read first: the reload unties tied embeddings, and only one of them is sent.
        self.lacking = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self.is_open = True

    def update_weights(self, update_info):
        info = self.parse_update_info(update_info)
        self.receive_weights(info)
        if self.device.type != "cpu":  # the base method synchronises an accelerator: a CPU has none
            torch.accelerator.synchronize()
        if info.last and self.lacking:
            raise ValueError(f"no new weights for {sorted(self.lacking)}")

    def load(self, weights):
        self.lacking -= self.model.load_weights(weights)

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)
        self.is_open = False
        head = getattr(self.model, "lm_head", None)
        if hasattr(head, "cpu_linear"):
            # A packed copy on CPUs, which would stay old if it is tied to the embedding.
            head.quant_method.process_weights_after_loading(head)


@dataclass
class Files(WeightTransferUpdateInfo):
    paths: list[str]
    last: bool = True


def _place(name):
    """Sorts tensors by layer: vLLM holds back the tensors of a layer until it has all of them."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers or [-1]


class SharedEngine(_Checked):
    """Maps files of Hugging Face tensors; a worker reads only the pages it needs."""

    update_info_cls = Files

    def receive_weights(self, update_info):
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in update_info.paths]
            found = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118
            found.sort(key=lambda item: _place(item[0]))
            self.load((name, file.get_tensor(name)) for name, file in found)


@dataclass
class Group(WeightTransferInitInfo):
    host: str
    port: int
    first_rank: int
    """Rank of this server's first worker in the group; the trainer has rank 0."""
    world_size: int
    backend: str
    """nccl; gloo in tests on CPUs."""
    seconds: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    last: bool


def _unpacked(buffer, bucket):
    dtypes = [getattr(torch, name) for name in bucket.dtypes]
    sizes = [
        torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(bucket.shapes, dtypes)
    ]
    return unpack_tensor(buffer, bucket.names, bucket.shapes, dtypes, sizes)


class NcclEngine(_Checked):
    """Receives buckets in a process group of the trainer's first rank and all workers."""

    init_info_cls, update_info_cls = Group, Bucket
    group = None

    def init_transfer_engine(self, init_info):
        self.shutdown()
        rank, size = init_info.first_rank + self.parallel_config.rank, init_info.world_size
        limit = timedelta(seconds=init_info.seconds)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        if init_info.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self.group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self.group = dist.ProcessGroupGloo(store, rank, size, limit)

    def shutdown(self):
        if self.group is not None:
            self.group.abort()
            self.group = None

    def receive_weights(self, update_info):
        sizes = (
            torch.Size(shape).numel() * getattr(torch, name).itemsize
            for shape, name in zip(update_info.shapes, update_info.dtypes)
        )
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self.group.broadcast(buffer, 0).wait()
        self.load(_unpacked(buffer, update_info))


@dataclass
class Handles(IPCWeightTransferUpdateInfo):
    last: bool = field(default=True, kw_only=True)


class IpcEngine(_Checked):
    """Maps a buffer in the memory of the same GPU that the trainer fills again for each bucket."""

    update_info_cls = Handles

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.importer = PackedBufferImporter()

    def receive_weights(self, update_info):
        self.load(
            packed_ipc_consumer(
                ipc_handle=update_info.ipc_handles, names=update_info.names,
                shapes=update_info.shapes, dtype_names=update_info.dtype_names,
                tensor_sizes=update_info.tensor_sizes, device_index=self.device.index,
                importer=self.importer,
            )
        )  # fmt: skip

    def finish_weight_update(self):
        super().finish_weight_update()
        self.importer.close()


for _name, _engine in (
    ("rpp_shared", SharedEngine),
    ("rpp_nccl", NcclEngine),
    ("rpp_ipc", IpcEngine),
):
    WeightTransferEngineFactory.register_engine(_name, _engine)

_forward = Sampler.forward


def _forward_at_temperature(self, logits, sampling_metadata, *arguments, **named):
    """Makes "raw" log-probs those of softmax(logits / temperature), before top-k, top-p and bans."""
    temperature = sampling_metadata.temperature  # None if all rows are greedy

    def compute_logprobs(raw):
        scaled = raw.float()
        if temperature is not None:
            scaled = scaled / temperature.where(temperature >= _LOWEST, 1.0)[:, None]
        return scaled.log_softmax(-1)

    self.compute_logprobs = compute_logprobs
    return _forward(self, logits, sampling_metadata, *arguments, **named)


Sampler.forward = _forward_at_temperature


class Extension:
    """Mixed into vLLM's worker; its methods are called through /collective_rpc."""

    def rpp_model(self):
        """The model of this server: the config.json that it was started with, and what is settled
        elsewhere."""
        model = self.vllm_config.model_config
        return {
            "config": json.loads(Path(model.model, "config.json").read_text()),
            "max_length": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "transport": self.vllm_config.weight_transfer_config.backend,
        }

    def rpp_end_update(self):
        """Ends an update that a run has left unfinished, so that the next can start.

        Layers that it has not reached keep their weights, so the next must send all of them.
        """
        engine = self.weight_transfer_engine
        if engine.is_open:
            with set_current_vllm_config(self.vllm_config):
                engine.finish_weight_update()
        engine.reset_weight_update_target()
        self._weight_update_active = False
        return {}

    def rpp_sees(self, path):
        """Whether a file is there on this server's host."""
        return {"seen": Path(path).exists()}
