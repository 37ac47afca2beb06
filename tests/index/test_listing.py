"""Listing by several processes gives what listing by one gives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gallery_media import write_picture

from cots.data.samples import Sample, iter_samples
from cots.errors import MediaError, SourceError
from index.listing import list_samples


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """A folder with shards, a damaged file and a missing one; and a table that names some of its pictures again."""
    folder = tmp_path / "photos"
    for number in range(40):
        write_picture(folder / f"{number:03}.png", number, size=12)
    (folder / "empty.png").touch()
    for number in range(10):
        members = [f"{4 * number + place:03}.png" for place in range(4)]
        subprocess.run(["tar", "-cf", f"{number}.tar", *members], cwd=folder, check=True)
    (tmp_path / "table.csv").write_text("path,caption\nphotos/001.png,one\nphotos/none.png,none\n")
    return [folder, tmp_path / "table.csv", folder / "0*.png"]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_list_what_one_lists(sources: list[Path], monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr("index.listing.FILES", 7)
    expected_errors: list[MediaError] = []
    errors: list[MediaError] = []
    expected = list(iter_samples(sources, expected_errors.append))
    assert len(expected) == 80
    assert list(list_samples(sources, errors.append, processes)) == expected
    assert sorted(map(str, errors)) == sorted(map(str, expected_errors))
    assert len(errors) == 2


def test_errors_of_sources_come_out_of_the_processes(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("title,colour\na,red\n")
    listed: list[Sample] = []
    with pytest.raises(SourceError, match=r"bad\.csv"):
        listed.extend(list_samples([*sources, tmp_path / "bad.csv"], print, 2))
    with pytest.raises(SourceError, match="there is no file or folder"):
        listed.extend(list_samples([tmp_path / "nothing"], print, 2))


# Told to end while its processes wait for more to do.
LIST = """
import sys
from index import listing
listing.FILES = 1
if __name__ == "__main__":
    samples = listing.list_samples(sys.argv[1:], print, 2)
    next(samples)
    print("listing", file=sys.stderr, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_listing_that_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    for number in range(40):
        write_picture(tmp_path / "photos" / f"{number:03}.png", number, size=12)
    (tmp_path / "list.py").write_text(LIST)
    command = [sys.executable, str(tmp_path / "list.py"), str(tmp_path / "photos")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "listing\n"
        process.send_signal(end)
        try:
            process.communicate(timeout=60)  # until the last process that could write to its stderr has ended
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == -end
