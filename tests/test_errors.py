"""Errors that come out of another process say what they said there."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from cots.errors import CotsError, MediaError, MissingDependency, SourceError


@pytest.mark.parametrize(
    "error",
    [MediaError("a.png", "it is 0 bytes long"), MissingDependency("av", "pip install av"), SourceError("no such file")],
)
def test_an_error_survives_pickling(error: CotsError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def _read(path: str) -> None:
    raise MediaError(path, "not an image")


def test_what_a_process_could_not_read_is_named_in_another() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(MediaError) as caught:
        pool.submit(_read, "b.png").result()
    assert (caught.value.path, caught.value.reason) == ("b.png", "not an image")
