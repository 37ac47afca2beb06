"""Which frames of a video are embedded."""

from collections.abc import Callable
from dataclasses import dataclass

from cots.data.samples import Sample
from cots.data.video_io import Frames, probe, read_frames, uniform_times

FRAME_SECONDS = 1.0
MIN_FRAMES = 4
MAX_FRAMES = 600


@dataclass(frozen=True)
class FrameSampling:
    """Attributes:
    count: so many frames, at the centres of equal segments; None: one a second, as a gallery's moments need them.
    until: only the first so many seconds of a video count; None: all of it.
    """

    count: int | None = None
    until: float | None = None

    def read(self, sample: Sample, short_side: int, heed: Callable[[], None] = lambda: None) -> Frames:
        """Decode the frames of a video; `heed` as `read_frames`.

        Raises:
            MediaError, MissingDependency: as `read_frames`.
        """
        return self.read_media(sample.media(), short_side, sample.path, heed)

    def read_media(
        self, media: str | bytes, short_side: int, name: str, heed: Callable[[], None] = lambda: None
    ) -> Frames:
        """The same of a file's path or its bytes."""
        if self.count is None:
            return read_frames(
                media,
                interval=FRAME_SECONDS,
                min_frames=MIN_FRAMES,
                max_frames=MAX_FRAMES,
                short_side=short_side,
                name=name,
                heed=heed,
            )
        if self.until is None:
            return read_frames(media, count=self.count, short_side=short_side, name=name, heed=heed)
        duration = min(probe(media, name=name).duration, self.until)
        times = uniform_times(duration, self.count).tolist()
        return read_frames(media, times=times, short_side=short_side, name=name, heed=heed)


EVERY_SECOND = FrameSampling()
