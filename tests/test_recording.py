"""Functions recorded on a GPU give what they give unrecorded. Skipped where there is none."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from cots.model.pretrained import load_model
from cots.recording import CALLS_BEFORE, MOST_RECORDINGS, RecordedFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Counting(nn.Module):
    """A small network that counts how often Python goes through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
        self.calls = 0

    def forward(self, given: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(given)


def test_calls_of_one_shape_are_replayed_and_give_the_same() -> None:
    network = Counting()
    recorded = RecordedFunction(network, torch.device("cuda"))
    for call in range(10):
        given = torch.randn(5, 16, device="cuda")
        torch.testing.assert_close(recorded(given), network.layers(given).detach())
        assert network.calls == (call + 1 if call < CALLS_BEFORE else CALLS_BEFORE + 2)  # prepared, then recorded


def test_threads_on_streams_of_their_own_get_their_own_results() -> None:
    network = Counting()
    recorded = RecordedFunction(network, torch.device("cuda"))

    def ask(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            given = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)).cuda()
            torch.testing.assert_close(recorded(given).cpu(), network.layers(given).detach().cpu())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert network.calls == CALLS_BEFORE + 2


def test_no_more_recordings_are_kept_than_allowed() -> None:
    network = Counting()
    recorded = RecordedFunction(network, torch.device("cuda"))
    for rows in range(1, MOST_RECORDINGS + 3):
        for _ in range(CALLS_BEFORE + 1):
            recorded(torch.zeros(rows, 16, device="cuda"))
    before = network.calls
    recorded(torch.zeros(MOST_RECORDINGS, 16, device="cuda"))
    assert network.calls == before
    recorded(torch.zeros(1, 16, device="cuda"))
    assert network.calls == before + 1


def test_what_waits_for_the_device_is_called_as_it_is() -> None:
    def waiting(given: Tensor) -> Tensor:
        return given * float(given.sum())

    recorded = RecordedFunction(waiting, torch.device("cuda"))
    for _ in range(CALLS_BEFORE + 3):
        given = torch.randn(4, device="cuda")
        torch.testing.assert_close(recorded(given), given * given.sum())


def test_a_models_embeddings_stay_what_they_were() -> None:
    model = load_model("embedded", device="cuda")
    pixels = torch.randint(256, (4, 3, model.image_size, model.image_size), dtype=torch.uint8)
    texts = ["a dog on the beach"]
    images, sentences = zip(
        *((model.encode_images(pixels), model.encode_texts(texts)) for _ in range(CALLS_BEFORE + 3))
    )
    for first, later in ((images[0], images[-1]), (sentences[0], sentences[-1])):
        torch.testing.assert_close(later, first, atol=1e-3, rtol=0)
