"""What the commands print, apart from the commands."""

import pytest

from cots.commands.terminal import clock


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00.0"), (3.75, "0:03.8"), (59.94, "0:59.9"), (59.97, "1:00.0"), (3599.96, "60:00.0")]
)
def test_no_minute_has_sixty_seconds(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
