"""What the commands print, apart from the commands."""

import pytest

from cots.commands.terminal import clock, per_second, progress_bar
from cots.embed import Progress


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00.0"), (3.75, "0:03.8"), (59.94, "0:59.9"), (59.97, "1:00.0"), (3599.96, "60:00.0")]
)
def test_no_minute_has_sixty_seconds(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize(("rate", "shown"), [(0.0043, "0.0043/s"), (0.31, "0.31/s"), (2, "2/s"), (98.4, "98/s")])
def test_slow_work_has_a_rate(rate: float, shown: str) -> None:
    assert per_second(rate) == shown


def test_a_log_counts_what_could_not_be_read_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("embedding") as (show, _):
        show(Progress(done=1, failed=1, total=5, seconds=8.0))
    assert capsys.readouterr().err == "embedding: 2 of 5, 0.25/s, 12 s left\n"
