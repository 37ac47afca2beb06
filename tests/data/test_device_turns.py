"""Streams of a device that do not wait for each other."""

import os
import subprocess
import sys

import pytest
import torch

from cots.data.device_turns import DeviceTurns


@pytest.mark.parametrize(("own", "expected"), [({}, "32"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "1")])
def test_bulk_embedding_asks_for_a_queue_for_each_stream_unless_told_otherwise(
    own: dict[str, str], expected: str
) -> None:
    """Before the GPU is used for the first time, which is when the driver reads it."""
    others = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    script = (
        "import os, cots.embed, torch; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'], torch.cuda.is_initialized())"
    )
    told = subprocess.run([sys.executable, "-c", script], env=others | own, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [expected, "False"]


def test_a_turn_that_fails_is_given_back() -> None:
    turns = DeviceTurns(torch.device("cpu"), 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"), turns.turn():
            raise ValueError("broken")
