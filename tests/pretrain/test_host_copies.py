"""From augmentation to the queues a step hands the device nothing that it would have to wait for: the next one is
queued while it computes.

Copies are looked for on the meta device, whose tensors no CPU tensor meets unnoticed either.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cots.config import PretrainConfig
from cots.data.transforms import ColorJitter
from pretrain.distributed import Ranks
from pretrain.loader import Batch
from pretrain.trainer import Run

META = torch.device("meta")


class _CopiesFromTheCpu(TorchDispatchMode):
    """Collects the operators through which a CPU tensor comes to the device, those that do not wait left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        given = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type == "meta"]
        if given and made and not kwargs.get("non_blocking"):
            self.found.append(str(operator))
        return result


@pytest.mark.parametrize(("frames", "rule"), [(1, "deviations"), (3, "mixture")])
def test_a_step_copies_nothing_from_the_cpu(
    make_config: Callable[..., PretrainConfig],
    every_level: dict,
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
    rule: str,
) -> None:
    every_level["noise_filter"] |= {"rule": rule, "queue_size": 1000}
    data = {"frames_per_item": frames, "captions_per_item": 2}
    run = Run(make_config(objective=every_level, data=data), Ranks(0, 1, torch.device("cpu")))
    stepper = run.stepper.outlined()
    run.telemetry.close()
    stepper.jitter = ColorJitter(0.2, META)
    size, length = run.config.model.image_tower.image_size, run.config.model.text_tower.max_length
    shape = (6, 3, size, size) if frames == 1 else (6, frames, 3, size, size)
    counts = None if frames == 1 else (1, 3, 3, 1, 3, 3)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=META)
    token_ids = torch.ones(12, length, dtype=torch.int64, device=META)
    batch = Batch(pixels, token_ids, torch.arange(6, device=META), counts=counts)

    def on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "a tensor of Python's numbers is copied"
            return make(*args, **kwargs)

        return made

    for maker in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, maker, on_device(getattr(torch, maker)))
    with _CopiesFromTheCpu() as copies:
        batch.pixels = stepper.augment(batch.pixels)
        losses = stepper.losses(batch, progress=0.5)
        losses.total.backward()
        stepper.objective.enqueue(losses.features)
    assert copies.found == []
