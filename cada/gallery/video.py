"""Frames of videos, decoded one after the other by PyAV (the extra `video`)."""

import heapq
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from cada.files import CADAError, problem_of
from cada.gallery.regions import clock
from processing_cada import MAX_PIXELS


try:
    import av
    from av.video.reformatter import Interpolation
except ImportError:
    av = None


VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm")
# A file of any name may be a list of other files and addresses, which FFmpeg would open.
_ONLY = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "file"}
_NEAR = 10  # seconds of a video that are rather decoded than leapt over
_SAME = 0.0005  # seconds: times are in milliseconds
_SLACK = 1.0  # seconds: how exact the length is that a file claims, and how long its last frame may be shown


def is_video(path: str) -> bool:
    """Whether a file is a video, by its ending."""
    return Path(path).suffix.lower() in VIDEOS


class _Stream:
    """The first video stream of a file, from a moment at or before `start` seconds on."""

    def __init__(self, file: Path, start: float = 0.0):
        if av is None:
            raise CADAError('is a video, which needs PyAV. In a clone of this repository: pip install -e ".[video]"')
        try:
            self.container = av.open(str(file), options=_ONLY)
            if not self.container.streams.video:
                raise CADAError("has no video stream; give a file that has one")
            self.video = self.container.streams.video[0]
            self.video.thread_type = "AUTO"
            self.video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            self.beginning = (self.container.start_time or 0) / av.time_base
            self.has_times = self.container.format.name != "avi"
            if start > _NEAR and self.has_times:
                # Some formats find what is decoded at a time, a little before it is shown.
                self.container.seek(int((start - 1 + self.beginning) * av.time_base))
        except (av.FFmpegError, OSError) as error:
            raise CADAError(f"cannot be opened as a video: {problem_of(error)}. Is it whole?") from error

    def frames(self) -> Iterator[tuple[float, "av.VideoFrame"]]:
        """
        Times in seconds since the beginning, and frames that are whole, in the order of time. A `CADAError` at the end
        where that is not the end of the video, or parts are damaged.
        """
        end, damaged, places = 0.0, None, []
        for frame in self._decoded(places):
            if self.has_times and frame.pts is not None:
                time = float(frame.pts * frame.time_base) - self.beginning
            else:  # AVI has places in the order of decoding only: the first frame that is shown has the first of these
                time = float(heapq.heappop(places) * self.video.time_base) if places else end
            time = max(0.0, round(time, 3))
            if frame.is_corrupt:
                damaged = damaged or clock(time)
                continue
            end = time + float((frame.duration or 0) * frame.time_base)
            yield time, frame
        if damaged or self.broken or end < self._length() - _SLACK:
            raise CADAError(f"is damaged or cut off at {damaged or clock(end)}; only frames that are whole are taken")

    def _decoded(self, places: list[int]) -> Iterator["av.VideoFrame"]:
        """The frames in the order of time; of AVI the places of the packets come on the heap `places`."""
        packets, self.broken, frames = self.container.demux(self.video), False, []
        while frames is not None:
            try:
                packet = next(packets, None)
                frames = None if packet is None else packet.decode()
            except av.FFmpegError:
                packet, frames, self.broken = None, None, True
            if packet is not None and packet.dts is not None and not self.has_times:
                heapq.heappush(places, packet.dts)
            yield from frames or ()
        if self.broken:
            with suppress(av.FFmpegError):
                frames = self.video.decode(None)  # what the decoder still holds
            yield from frames or ()

    def _length(self) -> float:
        """What the file says that the length of the video is, in seconds; 0 where it says nothing."""
        if self.video.duration is not None:
            return float(self.video.duration * self.video.time_base)
        if written := re.match(r"(\d+):(\d+):(\d+)", self.video.metadata.get("DURATION", "")):  # of Matroska
            hours, minutes, seconds = map(int, written.groups())
            return hours * 3600 + minutes * 60 + seconds
        return (self.container.duration or 0) / av.time_base


def sample(file: Path, fps: float) -> Iterator[tuple[float, "av.VideoFrame"]]:
    """
    Time and frame, `fps` of them for each second: the first one of each such span that has any, so a variable frame
    rate does no harm. A `CADAError` where there is none, and at the end where parts are damaged or missing.
    """
    last = None
    for time, frame in _Stream(file).frames():
        span = int((time + _SAME) * fps)
        if span != last:
            last = span
            yield time, frame
    if last is None:
        raise CADAError("has no frames")


def picture(frame: "av.VideoFrame") -> bytes:
    """A frame as an image file, upright. The same bytes on every processor, as an index keeps their digest."""
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
    pixels = frame.reformat(format="rgb24", interpolation=exact).to_ndarray()
    pixels = np.rot90(pixels, round(frame.rotation / 90))
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


class _Player:
    """The frames of a video with one of them shown, and the next one at hand."""

    def __init__(self, file: Path, start: float):
        self.frames = _Stream(file, start).frames()
        self.shown = self.next = self._decoded()
        if self.shown is None:
            raise CADAError("has no frames")

    def _decoded(self) -> tuple[float, "av.VideoFrame"] | None:
        with suppress(CADAError):  # an index knows of the frames up to there
            return next(self.frames, None)
        return None

    def at(self, time: float) -> "av.VideoFrame":
        """The frame that is shown at `time`, which must not be before what is shown."""
        while self.next is not None and self.next[0] <= time + _SAME:
            self.shown, self.next = self.next, self._decoded()
        if self.next is None and time > self.shown[0] + _SLACK:
            raise CADAError(f"has no frame at {clock(time)}; the last one is that of {clock(self.shown[0])}")
        return self.shown[1]


class VideoReader:
    """Reads frames by their time. Those that are asked for in the order of time are decoded in one stream."""

    def __init__(self):
        self._players: dict[Path, _Player] = {}  # the last one and its file, while no other thread reads from it
        # Its threads would be missing in a new process, which would wait for them for ever.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._players.clear)

    def read(self, file: Path, time: float) -> bytes:
        """
        The frame that is shown at `time`, in seconds since the beginning, as an image file.

        Raises:
            CADAError: where the video cannot be opened, or has no such frame.
        """
        player = self._players.pop(file, None)
        if player is None or not player.shown[0] - _SAME <= time <= player.shown[0] + _NEAR:
            player = _Player(file, time)
            if player.shown[0] > time + _SAME:  # the leap went too far
                player = _Player(file, 0)
        frame = player.at(time)
        self._players.clear()
        self._players[file] = player
        return picture(frame)
