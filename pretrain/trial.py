"""A few real steps on a small batch, and what they say of the memory and the time of the whole training."""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cots.config import PretrainConfig
from pretrain.determinism import deterministic_arithmetic
from pretrain.distributed import process_group
from pretrain.loader import Batch
from pretrain.sharding import layers_of
from pretrain.step import TrainingStep
from pretrain.trainer import Run

_PAIRS = 8
_PAIRS_ON_GPU = 64  # fewer would measure how quickly kernels are launched
_TIMED_STEPS = 3
_GPUS = (2, 4, 8)


@dataclass
class Trial:
    """Attributes:
    device: what the steps ran on, for people.
    pairs: of a timed step; `seconds`: that it took.
    memory: bytes of the training as configured, by what they are for.
    sharded: bytes on each GPU with weights shared out among so many; empty if the towers or the batch do not divide.
    device_memory: bytes that the device has, a CPU those of the machine; None where they are not told.
    checkpoint: bytes of one checkpoint; `disk`: bytes free where they will be written.
    """

    device: str
    pairs: int
    seconds: float
    memory: dict[str, int] = field(default_factory=dict)
    sharded: dict[int, int] = field(default_factory=dict)
    device_memory: int | None = None
    checkpoint: int = 0
    disk: int = 0


def try_out(config: PretrainConfig) -> Trial:
    """Take one step on at most 8 pairs through the whole trainer, its log and its checkpoint, in a directory beside
    the run's that is removed afterwards; then time and measure steps on pictures of nothing.

    Nothing is compiled, and nothing validated.

    Raises:
        CotsError: what would stop the training.
        RuntimeError: a step fails.
    """
    output = Path(config.training.output).absolute()
    beside = next(parent for parent in output.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".check-", dir=beside) as directory:
        small = _small(config, Path(directory) / "run")
        arithmetic = deterministic_arithmetic(config.training.deterministic)
        with arithmetic, process_group(config.training.device) as ranks, redirect_stderr(io.StringIO()):
            run = Run(small, ranks)
            try:
                run.train()
            finally:
                run.telemetry.close()
            (checkpoint,) = run.directory.glob("checkpoints/*.pt")
            trial = _measure(config, run.stepper)
            trial.checkpoint, trial.disk = checkpoint.stat().st_size, shutil.disk_usage(directory).free
    return trial


def _small(config: PretrainConfig, output: Path) -> PretrainConfig:
    """The same training, one step long."""
    pairs = min(config.training.batch_size, _PAIRS)
    in_parts = config.training.accumulation > 1 and pairs % 2 == 0
    training = config.training.model_copy(
        update={
            "output": str(output),
            "batch_size": pairs,
            "accumulation": 2 if in_parts else 1,
            "epochs": 1e-9,
            "log_every": 1,
            "compile": False,
            "resume": False,
            "tensorboard": False,
            "wandb": "",
            "trace_step": 0,
        }
    )
    # no cache: it would decode the whole collection
    data = config.data.model_copy(update={"workers": 0, "validation": [], "cache_side": None})
    return config.model_copy(update={"training": training, "data": data})


def _measure(config: PretrainConfig, stepper: TrainingStep) -> Trial:
    device = stepper.device
    on_gpu = device.type == "cuda"
    pairs = min(config.training.batch_size, _PAIRS_ON_GPU if on_gpu else _PAIRS)
    stepper.config = config.model_copy(
        update={"training": config.training.model_copy(update={"accumulation": 1, "batch_size": pairs})}
    )
    few, more = (_saved_bytes(stepper, _empty_batch(config, count, device)) for count in (2, 4))
    stepper.take(_empty_batch(config, pairs, device), 0, 1)
    started = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        loss = stepper.take(_empty_batch(config, pairs, device), 0, 1)["loss"]
    loss.item()  # waits for the device
    seconds = (time.perf_counter() - started) / _TIMED_STEPS
    if config.training.accumulation > 1:
        seconds *= 4 / 3  # gradient caching: another forward pass, a third of a step's work
    trial = Trial(torch.cuda.get_device_name(device) if on_gpu else "CPU", pairs, seconds)
    trial.memory = _standing_memory(stepper)
    part = config.training.batch_size / config.training.accumulation
    trial.memory["activations"] = round(few + (more - few) / 2 * (part - 2))
    trial.sharded = _sharded_memory(config, stepper, trial.memory)
    trial.device_memory = _device_memory(device)
    return trial


def _device_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows has neither
        return None


def _empty_batch(config: PretrainConfig, items: int, device: torch.device) -> Batch:
    """Grey pictures with captions of full length."""
    data, text = config.data, config.model.text_tower
    size = config.crop_size
    frames = (data.frames_per_item,) if data.frames_per_item > 1 else ()
    pixels = torch.full((items, *frames, 3, size, size), 128, dtype=torch.uint8, device=device)
    token_ids = torch.ones(items * data.captions_per_item, text.max_length, dtype=torch.int64, device=device)
    return Batch(pixels, token_ids, torch.arange(items, device=device))


def _standing_memory(stepper: TrainingStep) -> dict[str, int]:
    """Bytes that are there in every step, whatever the batch."""
    weights = _bytes(stepper.network, stepper.working.network)
    slow = [copy.network for copy in (stepper.momentum, stepper.momentum_working) if copy is not None]
    momentum = _bytes(*slow)
    average = _bytes(stepper.average.network) if stepper.average is not None else 0
    states = list(stepper.optimizer.state.values())
    optimizer = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
    trained = [parameter for parameter in stepper.parameters if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    if stepper.low_precision:
        gradients += gradients // 2  # the bf16 ones and their fp32 copies
    return {
        "weights": weights,
        "momentum": momentum,
        "average": average,
        "gradients": gradients,
        "optimizer": optimizer,
        "queues": _bytes(stepper.objective),
    }


def _sharded_memory(config: PretrainConfig, stepper: TrainingStep, memory: dict[str, int]) -> dict[int, int]:
    """Bytes on each of several GPUs that share out weights, averages, gradients and optimizer state (see sharding.py).

    Each holds its part of them in fp32, the queues, the activations of its part of the batch, and, gathered in what the
    towers compute in, the layer at work, the next one and all that lies outside of the layers, with their gradients.
    """
    encoder = stepper.network.encoder
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        return {}
    layers = [_bytes(layer) for layer in layers_of(encoder)]
    gathered = 2 * (_bytes(stepper.network) - sum(layers) + 2 * max(layers, default=0))
    if stepper.low_precision:
        gathered //= 2
    trained = sum(parameter.nbytes for parameter in stepper.parameters)
    momentum = _bytes(stepper.momentum.network) if stepper.momentum is not None else 0
    shared = _bytes(stepper.network) + momentum + memory["average"] + trained + memory["optimizer"]
    parts = config.training.accumulation
    return {
        gpus: (shared + memory["activations"]) // gpus + gathered + memory["queues"]
        for gpus in _GPUS
        if config.training.batch_size % (gpus * parts) == 0
    }


def _bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = [tensor for module in modules for tensor in _tensors(module)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _saved_bytes(stepper: TrainingStep, batch: Batch) -> int:
    """Bytes that a step keeps for its backward pass, weights aside."""
    networks = (stepper.network, stepper.working.network, stepper.objective)
    with _count_saved(tensor for network in networks for tensor in _tensors(network)) as saved:
        stepper.take(batch, 0, 1)
    return sum(saved.values())


@contextmanager
def _count_saved(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collects the storages (address -> bytes) that autograd keeps, except those of known tensors."""
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        in_backward = torch._C._current_graph_task_id() != -1
        if storage.data_ptr() not in not_counted and not in_backward:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
