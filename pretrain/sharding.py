"""Weights shared out among the ranks (FSDP2): each keeps a part in fp32, and gathers a layer to compute with it.

The parts are DTensors, split along their first dimension. What leaves the training, a checkpoint or a model, is whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cots.errors import ConfigError
from cots.model.dual_encoder import DualEncoder
from cots.model.tower import Tower
from pretrain.network import TrainingNetwork


def shard_network(network: TrainingNetwork, dtype: torch.dtype | None) -> None:
    """Share out the weights of a network that learns, in place.

    Args:
        dtype: in which the towers and heads compute, None: fp32. What follows the towers computes in fp32 always, and
            gradients are summed in fp32.

    Raises:
        ConfigError: a tower has batch norms, whose statistics every rank would gather of its own part of the batch.
    """
    _shard_layers(network.encoder, dtype)
    fully_shard(network, mp_policy=_policy(dtype))


def shard_average(encoder: DualEncoder, dtype: torch.dtype | None) -> None:
    """Share out the weights of an encoder that only follows another one, in place."""
    _shard_layers(encoder, dtype)
    # a root keeps its whole weights for the backward pass, by default, and would not see how the parts move
    fully_shard(encoder, mp_policy=_policy(dtype), reshard_after_forward=True)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(encoder, method)


def layers_of(encoder: DualEncoder) -> Iterator[nn.Module]:
    """The layers that both towers repeat: the members of each outermost list of modules of one class."""
    for tower in (encoder.image_tower, encoder.text_tower):
        yield from _repeated(tower)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is shared out, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any, keep: bool) -> Any:
    """Nested dictionaries and lists with every tensor whole and on the CPU, where `keep` is set.

    All ranks must call it, for it takes them a meeting a tensor; those that do not keep get None for tensors.
    """
    if isinstance(state, Tensor):
        gathered = state.full_tensor() if isinstance(state, DTensor) else state
        return gathered.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    return state


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """load_state_dict of whole weights, of which every rank takes its part."""
    own = module.state_dict()
    module.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """load_state_dict of an optimizer whose state is whole, of which every rank takes its part.

    Raises:
        ConfigError: it is of other parameters.
    """
    before, now = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if before != now:
        raise ConfigError(
            f"The checkpoint trains {sum(before)} parameters and this version {sum(now)}: the layers that learn "
            "are others; start a new training.output."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        index: {
            name: _like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that the norm of all of them, over all ranks' parts, is at most `limit`.

    Returns the norm before, () float32. The twin of nn.utils.clip_grad_norm_, which refuses to mix parts and wholes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    wholes = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(squares)
    if wholes:  # the norm of none would be a number of the CPU's
        squares += nn.utils.get_total_norm(wholes).square()
    norm = squares.sqrt()
    torch._foreach_mul_([*parts, *wholes], (limit / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _shard_layers(encoder: DualEncoder, dtype: torch.dtype | None) -> None:
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            f"training.sharding=sharded is for towers without batch norms, and {encoder.config.image_tower.name} has "
            "some; set training.sharding=replicated."
        )
    for layer in layers_of(encoder):
        fully_shard(layer, mp_policy=_policy(dtype))
    for module in encoder.children():
        if not isinstance(module, Tower):
            fully_shard(module, mp_policy=_policy(None))


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    members = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    if is_list and len(members) > 1 and len({type(member) for member in members}) == 1:
        yield from members
        return
    for member in members:
        yield from _repeated(member)


def _like(value: Tensor, own: Tensor | None) -> Tensor:
    """This rank's part of a whole value, if its own one is a part."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
