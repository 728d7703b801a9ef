"""What of a file is indexed: the whole image, or the box of a person, in a photo or in a frame of a video."""

import re
from typing import NamedTuple

from cada.data.images import Box


_FRAGMENT = re.compile(r"#(?=.)(?:t=(\d{2,}):(\d\d):(\d\d\.\d{3}))?&?(?:xywh=(\d+),(\d+),(\d+),(\d+))?\Z")


class Region(NamedTuple):
    """
    A part of an image. Its name tells it from all others of an index; it is a media fragment (a W3C recommendation)
    such as `street.jpg#xywh=160,120,40,96`, `walk.mp4#t=00:00:12.000&xywh=160,120,40,96`, or the path alone.
    """

    path: str
    box: Box | None = None  # by default the whole image
    time: float | None = None  # of a video, in seconds since its beginning

    @property
    def name(self) -> str:
        """The name that [`Region.of`] reads. Names of a video are in the order of time."""
        parts = [] if self.time is None else [f"t={clock(self.time)}"]
        parts += [] if self.box is None else ["xywh=" + ",".join(map(str, self.box))]
        return self.path + ("#" + "&".join(parts) if parts else "")

    @property
    def frame(self) -> "Region":
        """The whole image that it is a part of."""
        return self._replace(box=None)

    @classmethod
    def of(cls, name: str) -> "Region":
        """The region of a name."""
        found = _FRAGMENT.search(name)
        if found is None:
            return cls(name)
        hours, minutes, seconds, *box = found.groups()
        time = None if hours is None else round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 3)
        return cls(name[: found.start()], None if box[0] is None else tuple(map(int, box)), time)


def clock(time: float) -> str:
    """A time in seconds as `00:01:05.250`."""
    minutes, milliseconds = divmod(round(time * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds / 1000:06.3f}"
