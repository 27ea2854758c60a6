"""Video in, video out: while a frame is painted, the next one is read and the one before it is written."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data import NotFinite, PictureError, is_picture, prepare_picture
from folders import find_pictures, is_searched
from painting.control import check_styles, combine
from painting.pairs import check_outputs
from painting.smoothing import Blender, Motion, MotionTracker, on_grid
from painting.stylizer import Stylizer, load_input
from utils import UserError, make_folder, note, progress_bar, replacing

# Container, encoder and its settings, by the suffix of a file to write. Quick enough to keep up with a small network.
_H264 = ("libx264", {"preset": "superfast", "crf": "18"})
_VP9 = ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "7", "row-mt": "1", "crf": "24", "b": "0"})
VIDEO_FORMATS = {".mp4": ("mp4", *_H264), ".m4v": ("mp4", *_H264), ".mov": ("mov", *_H264),
                 ".mkv": ("matroska", *_H264), ".webm": ("webm", *_VP9)}
# Files that begin so are videos, or those named so: a video whose beginning is damaged is no picture either.
_SIGNATURES = (b"\x1a\x45\xdf\xa3", b"FLV\1", b"\0\0\1\xba", b"\0\0\1\xb3", b"OggS", b"\x30\x26\xb2\x75\x8e\x66")
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # MP4 and QuickTime
_SUFFIXES = (*VIDEO_FORMATS, ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv")
# What libavformat may take a file for: formats of one file alone. A playlist could name any other, or an address.
_READ = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf,dv,nut,ivf"
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo")  # a frame's number says when it is shown
_STATE_THEIR_LENGTH = ("mov", "matroska")  # at their beginning, which a file that is cut short still has
_UNSPECIFIED, _BT709, _LIMITED, _PQ, _HLG = 2, 1, 1, 16, 18  # in libavutil: colours, their range, transfer functions
_PACKAGES = {"av": ("av", 17), "cv2": ("opencv-python-headless", 4)}  # older av: BT.709's colours as BT.601's
_HD_HEIGHT = 720  # from here on players take colours that a file does not name for BT.709


def is_video(path: Path) -> bool:
    """Whether a file is a video: by its first bytes, or where those are damaged by its suffix."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for its other end
            return False
        with open(path, "rb") as file:
            head = file.read(189)
    except OSError:
        return False
    is_mpeg_ts = head[:1] == b"G" and head[188:] == b"G"  # packets of 188 bytes
    begins_so = head.startswith(_SIGNATURES) or head[4:8] in _BOXES or head[8:12] == b"AVI " or is_mpeg_ts
    return (begins_so or Path(path).suffix.lower() in _SUFFIXES) and not is_picture(path)


def _import(module: str, wanted_by: str):
    """A package that only videos need. Raises UserError where it is not there, or too old."""
    package, oldest = _PACKAGES[module]
    try:
        imported = import_module(module)
        if int(imported.__version__.split(".")[0]) >= oldest:
            return imported
        found = f", not {imported.__version__}"
    except ImportError:
        found = ""
    raise UserError(f"{wanted_by} needs the package {package}, version {oldest} or newer{found}; in the toolkit's "
                    "folder: pip install '.[video]'")


@dataclass
class Frame:
    """One frame on its way from file to file."""

    pixels: np.ndarray  # (H, W, 3), uint8, upright
    time: int  # when it is shown, in units of its clip's time_base
    duration: int  # in the same
    motion: Motion | None = None


@dataclass
class Clip:
    """A video to read: what its head says, its frames, and what went wrong while they were read."""

    source: str  # the argument that named it, and its path
    time_base: Fraction  # seconds
    rate: Fraction  # frames a second, on average
    count: int | None = None  # of frames, about
    pixel_aspect: Fraction = Fraction(1)  # width by height
    frames: Iterator[Frame] = iter(())
    sound_streams: list = field(default_factory=list)  # PyAV's
    sound: deque = field(default_factory=deque)  # the packets that were read along with the frames
    painted: int = 0  # frames
    fault: str | None = None  # the first

    def fail(self, reason: str) -> None:
        self.fault = self.fault or reason


# ------------------------------------------------------------------------------------------------ reading


@contextmanager
def open_video(path: Path, flag: str, config):
    """The Clip of a video file. config: imsize, cropsize and max_pixels, as for pictures.

    Raises UserError, also while frames are read, for what is no video, has no video stream or too many pixels.
    """
    source = f"{flag} {path}"
    av = _import("av", f"{source}: a video")
    try:
        container = av.open(f"file:{path}", options={"format_whitelist": _READ})
    except av.FFmpegError as error:
        raise UserError(f"{source}: not a readable video ({error.strerror or error})") from error
    with container:
        streams = [stream for stream in container.streams.video
                   if not stream.disposition & av.stream.Disposition.attached_pic]  # the cover of an album
        if not streams:
            raise UserError(f"{source}: has no video stream")
        stream = streams[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        seconds = Fraction(container.duration or 0, av.time_base)
        clip = Clip(source, stream.time_base, rate, stream.frames or round(seconds * rate) or None,
                    sound_streams=list(container.streams.audio))
        clip.frames = _read_frames(av, container, stream, clip, config)
        yield clip


def _read_frames(av, container, stream, clip: Clip, config) -> Iterator[Frame]:
    """The frames of `stream`, upright and all of one size."""
    # Of a broadcast, which begins at some time of day; below 0 there is nothing but the lead-in of sound.
    start = Fraction(max(0, container.start_time or 0), av.time_base)
    has_times = container.format.name not in _WITHOUT_TIMES
    regular = max(1, round(1 / (clip.rate * clip.time_base)))
    size = last = None
    for frame in _decode(av, container, stream, clip, start):
        if size is None:
            size = _scaled_size(frame.width, frame.height, config, clip.source)
            clip.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            if _upright(frame, np.empty((1, 2, 3))).shape == (2, 1, 3):  # what was a row is a column
                clip.pixel_aspect = 1 / clip.pixel_aspect
            if stream.codec_context.color_trc in (_PQ, _HLG):
                note(f"{clip.source}: its high dynamic range is not converted: the frames are painted from pale ones")
        if has_times and frame.pts is not None:
            shown = frame.pts - round(start / clip.time_base)
        else:
            shown = 0 if last is None else last.time + last.duration
        if last is not None:
            shown = max(shown, last.time + 1)
        duration = frame.duration if has_times and frame.duration else regular
        last = Frame(_crop(_upright(frame, _to_rgb(frame, size)), config.cropsize), shown, duration)
        yield last


def _decode(av, container, stream, clip: Clip, start: Fraction) -> Iterator:
    """The frames of `stream`, PyAV's. The packets of sound go to the clip, counted from `start`, in seconds, and so do
    faults."""

    def decode(packet) -> Iterator:
        try:
            yield from stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            clip.fail(f"parts of it cannot be decoded ({error.strerror})")

    end = Fraction(0)
    try:
        for packet in container.demux():
            if packet.is_corrupt:
                clip.fail("a part of it is missing")
                continue
            if packet.dts is not None:
                packet.pts = packet.dts if packet.pts is None else packet.pts
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.type == "audio":
                    ticks = round(start / packet.time_base)
                    packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                    clip.sound.append(packet)
            if packet.stream is stream:
                yield from decode(packet)  # at the end of the file, an empty one has the decoder give what it holds
    except av.FFmpegError as error:
        clip.fail(f"it cannot be read to its end ({error.strerror})")
        yield from decode(None)
    missing = float(start + Fraction(container.duration or 0, av.time_base) - end)
    if container.format.name.startswith(_STATE_THEIR_LENGTH) and missing > 0.1 + 1 / clip.rate:
        clip.fail(f"its last {missing:.1f} seconds are missing")


def _upright(frame, pixels: np.ndarray) -> np.ndarray:
    """The pixels of a frame, (H, W, 3), as they are to be shown: turned by quarters, mirrored. PyAV's own `rotation`
    does not tell what is mirrored."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return pixels
    # Column and row are to be shown at a * column + c * row and b * column + d * row.
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _scaled_size(width: int, height: int, config, source: str) -> tuple[int, int]:
    """Width and height that --imsize and --cropsize bring a frame to, before the cut. A longer side becomes even where
    it is scaled: most players want even sides."""
    shorter = min(width, height)
    side = max(config.imsize or shorter, config.cropsize or 0)
    scaled = (width, height) if side == shorter else tuple(
        side if length == shorter else max(side, 2 * round(length * side / shorter / 2)) for length in (width, height))
    for columns, rows in ((width, height), scaled):
        if columns * rows > config.max_pixels:
            raise UserError(f"{source}: frames of {columns} x {rows} pixels are more than --max_pixels "
                            f"{config.max_pixels}")
    return scaled


def _to_rgb(frame, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), uint8, of PyAV's frame at another size."""
    width, height = size
    unnamed = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_HEIGHT
    return frame.reformat(width, height, "rgb24", src_colorspace="ITU709" if unnamed else None,
                          interpolation="BICUBIC").to_ndarray()


def _crop(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """The square of `side` pixels in the centre; None: all."""
    if side is None:
        return pixels
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


@contextmanager
def open_frames(folder: Path, flag: str, config):
    """The Clip of a folder or archive of pictures, in the order of the numbers in their names.

    config: imsize, cropsize, max_pixels, frame_rate.

    A picture that cannot be used, or is of another size than the first, is skipped: the one before it stays. Raises
    UserError as `find_pictures` does.
    """
    paths = sorted(find_pictures(folder, f"--{flag}"), key=natural_order)
    rate = Fraction(config.frame_rate).limit_denominator(100_000)
    clip = Clip(f"{flag} {folder}", 1 / rate, rate, len(paths))

    def read() -> Iterator[Frame]:
        first = None
        for number, path in enumerate(paths):
            try:
                picture = prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
                height, width = picture.shape[2:]
                first = first or (width, height)
                if (width, height) != first:
                    raise PictureError(f"{path}: {width} x {height} pixels, the first frame has {first[0]} x "
                                       f"{first[1]}")
                yield Frame(picture[0].permute(1, 2, 0).numpy(), number, 1)
            except PictureError as error:
                note(f"skipped {error}")
                clip.fail("the skipped ones cannot be used")

    clip.frames = read()
    yield clip


def natural_order(path: Path) -> list:
    """Sorts frame9 before frame10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if number % 2 else (0, part) for number, part in enumerate(parts)]


# ------------------------------------------------------------------------------------------------ writing


class _Writer:
    """Encodes frames into a file, and copies the packets of sound as they are."""

    def __init__(self, av, path: str, target: Path, clip: Clip, width: int, height: int) -> None:
        """path: to write to; target: its later name, whose suffix says the format."""
        self._av, self._clip = av, clip
        container_format, codec, options = VIDEO_FORMATS[target.suffix.lower()]
        self._container = av.open(f"file:{path}", "w", format=container_format)
        self._stream = self._container.add_stream(codec, rate=clip.rate, options=options)
        self._stream.width, self._stream.height = width, height
        # H.264 halves the colours of even sides only.
        halved = codec != "libx264" or width % 2 == height % 2 == 0
        self._stream.pix_fmt = "yuv420p" if halved else "yuv444p"
        if not halved:
            note(f"{target}: {width} x {height} pixels have an odd side, so colours are kept in full (yuv444p), which "
                 "some players cannot show; .webm can do without")
        context = self._stream.codec_context
        context.time_base, context.sample_aspect_ratio = clip.time_base, clip.pixel_aspect
        context.flags |= av.codec.context.Flags.frame_duration
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        self._sound = {}
        for stream in clip.sound_streams:
            if stream.codec_context.codec.canonical_name in self._container.supported_codecs:
                self._sound[stream] = self._container.add_stream_from_template(stream)
                self._sound[stream].metadata.update(stream.metadata)
            else:
                note(f"{clip.source}: its sound ({stream.codec_context.name}) is left out: {target.suffix} files "
                     "cannot hold it as it is; .mkv can")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        self._container.close()

    def write(self, frame: Frame) -> None:
        """Write a frame, and the sound that was read so far."""
        self._copy_sound()
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.pixels), format="rgb24")
        picture = picture.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base, picture.duration = frame.time, self._clip.time_base, frame.duration
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        """Write the rest of the sound, and the frames that the encoder still holds."""
        self._copy_sound()
        self._container.mux(self._stream.encode(None))

    def _copy_sound(self) -> None:
        while self._clip.sound:
            packet = self._clip.sound.popleft()
            if packet.stream in self._sound:
                packet.stream = self._sound[packet.stream]
                self._container.mux(packet)


# ----------------------------------------------------------------------------------------------- painting


def paint_video(clip: Clip, target: Path, paint: Callable[[np.ndarray], np.ndarray], stride: int,
                temporal_smoothing: float = 0.0) -> int:
    """Paint every frame of a clip, in order, into the video file `target`, which appears when it is complete.

    paint: (H, W, 3), uint8, to the same; stride: of the grid that it works on, pixels; temporal_smoothing: the share
    in `Blender`, 0 for none. Returns the number of frames. Raises UserError when there is none, or when the video
    cannot be written.
    """
    av = _import("av", f"save_path {target}: a video")
    tracker = blender = None
    if temporal_smoothing:
        cv2 = _import("cv2", "temporal_smoothing")
        tracker, blender = MotionTracker(cv2, stride), Blender(cv2, temporal_smoothing)

    def follow(frames: Iterator[Frame]) -> Iterator[Frame]:
        for clip.painted, frame in enumerate(frames, 1):
            if tracker is not None:
                frame.motion = tracker.follow(frame.pixels)
            yield frame

    def paint_frame(frame: Frame) -> None:
        if frame.motion is None:
            frame.pixels = paint(frame.pixels)
            return
        (height, width), (top, left) = frame.pixels.shape[:2], frame.motion.shift
        on_its_grid = paint(on_grid(frame.pixels, frame.motion, stride))
        frame.pixels = on_its_grid[top : top + height, left : left + width]

    def write(path: str) -> None:
        height, width = first.pixels.shape[:2]
        with _Writer(av, path, target, clip, width, height) as video, ThreadPoolExecutor(1) as writer, \
                progress_bar(clip.count, "stylise", "frame") as bar:

            def write_frame(frame: Frame) -> None:
                if blender is not None:
                    frame.pixels = blender.blend(frame.pixels, frame.motion)
                video.write(frame)

            being_written = None
            for frame in chain([first], frames):
                paint_frame(frame)
                if being_written is not None:
                    being_written.result()
                being_written = writer.submit(write_frame, frame)
                bar.update()
            being_written.result()
            video.finish()

    with ThreadPoolExecutor(1) as reader:
        frames = _read_ahead(follow(clip.frames), reader)
        first = next(frames, None)
        if first is None:
            raise UserError(f"{clip.source}: no frame of it can be read" + (f" ({clip.fault})" if clip.fault else ""))
        with replacing(target) as file:
            try:
                write(file.name)
            except av.FFmpegError as error:
                raise UserError(f"save_path {target}: the video cannot be written ({error.strerror or error})") \
                    from error
    return clip.painted


def _read_ahead(items: Iterator, reader: ThreadPoolExecutor) -> Iterator:
    """The items; while one is worked on, the thread of `reader` makes the next."""
    coming = reader.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = reader.submit(next, items, None)
        yield item


# ------------------------------------------------------------------------------------------- in test mode


def makes_video(config) -> bool:
    """Whether test mode is to write a video: its content is one, or --save_path names one."""
    is_named = Path(config.save_path or "").suffix.lower() in VIDEO_FORMATS and not Path(config.save_path).is_dir()
    return is_named or any(map(is_video, config.input("content")[0]))


def check_video(config) -> Path:
    """The video file that test mode is to write. Raises UserError for what cannot be made a video, or is more than one.
    """
    (contents, content_flag), (styles, style_flag) = (config.input(kind) for kind in ("content", "style"))
    content, named = Path(contents[0]), {name: " ".join(map(str, values)) for name, values in (
        (content_flag, contents), (style_flag, styles), ("load_path", config.load_path),
        ("style_strength", config.style_strength))}
    refusals = {
        f"{content_flag} {named[content_flag]}: a video is made of one content": len(contents) > 1,
        f"{content_flag} {content}: no such file": not content.exists(),
        f"save_path {config.save_path}: a video is made of a video or of a folder of frames; --{content_flag} "
        f"{content} is neither": not is_searched(content) and not is_video(content),
        "mask: it is of a picture, and things move in a video": config.mask is not None,
        f"{style_flag} {named[style_flag]}: a video is painted in one style, or with --style_weights in a mixture":
            len(styles) > 1 and config.style_weights is None,
        "preserve_color histogram: the style would change with every frame of a video; luma does not":
            config.preserve_color == "histogram",
        f"load_path {named['load_path']}: a video is painted by one model": len(config.load_path) > 1,
        f"style_strength {named['style_strength']}: a video is painted at one": len(config.style_strength) > 1,
        "metrics: they are of pictures, not of a video": config.metrics is not None,
    }
    for style in styles:
        refusals[f"{style_flag} {style}: is a folder; a video takes one style picture"] = is_searched(style)
        refusals[f"{style_flag} {style}: is a video; a picture is needed"] = is_video(style)
    for message, applies in refusals.items():
        if applies:
            raise UserError(message)
    check_styles(len(styles), config.style_weights, None)
    target = config.output
    if config.save_path is None:
        target = target.with_suffix(".mp4")
    elif config.save_path.endswith(("/", os.sep)) or target.is_dir():
        target = target / f"{content.stem}_{'-'.join(Path(style).stem for style in styles)}.mp4"
    if target.suffix.lower() not in VIDEO_FORMATS:
        raise UserError(f"save_path {target}: a video is written to {' '.join(VIDEO_FORMATS)}, or into a folder, "
                        "whose name ends with /")
    read = [(f"--{content_flag}", content), *((f"--{style_flag}", Path(style)) for style in styles),
            ("--load_path", Path(config.load_path[0]))]
    check_outputs([target], (), (), read, target)
    return target


def stylize_video(config, stylizer: Stylizer, target: Path) -> int:
    """Test mode's work where `makes_video`. config: its settings; target: of `check_video`.

    Returns the exit code, 1 where not every frame could be read. Raises UserError for what the user can put right.
    """
    (contents, content_flag), (styles, style_flag) = (config.input(kind) for kind in ("content", "style"))
    content, (strength,) = Path(contents[0]), config.style_strength
    of_styles = replace(config, imsize=config.style_size or config.imsize)
    style = combine([stylizer.encode_style(load_input(Path(each), of_styles, style_flag)) for each in styles],
                    config.style_weights, None)

    def paint(pixels: np.ndarray) -> np.ndarray:
        frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        try:
            return np.asarray(stylizer.paint_picture(frame, style, strength,
                                                     keeps_colors=config.preserve_color == "luma"))
        except NotFinite as error:
            raise UserError(f"load_path {config.load_path[0]}: its picture of a frame has values that are not "
                            "finite") from error

    make_folder(target.parent, "save_path")
    opened = open_frames if is_searched(content) else open_video
    with opened(content, content_flag, config) as clip:
        frames = paint_video(clip, target, paint, stylizer.network.config.stride, config.temporal_smoothing)
    note(f"wrote {frames} frames to {target}")
    if clip.fault is None:
        return 0
    note(f"{clip.source}: damaged or cut short ({clip.fault}): only the frames that could be read are painted")
    return 1
