import pytest
from synthetic_media import number_of, write_video

from cots.data.frame_sampling import EVERY_SECOND, FrameSampling
from cots.data.samples import Sample


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Six seconds at ten frames a second, each of which shows its number."""
    path = write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=60)
    return Sample(str(path), "video")


def test_a_frame_a_second_or_so_many_at_the_centres_of_equal_segments(clip: Sample) -> None:
    shown = {
        sampling: [number_of(picture) for picture in sampling.read(clip, 96).images]
        for sampling in (EVERY_SECOND, FrameSampling(count=3), FrameSampling(count=3, until=3.0))
    }
    assert shown[EVERY_SECOND] == [5, 15, 25, 35, 45, 55]
    assert shown[FrameSampling(count=3)] == [10, 30, 50]
    assert shown[FrameSampling(count=3, until=3.0)] == [5, 15, 25]


def test_a_limit_beyond_the_end_changes_nothing(clip: Sample) -> None:
    limited, whole = (FrameSampling(4, until).read(clip, 96) for until in (100.0, None))
    assert limited.times == whole.times
