"""Video in, video out: frames are read, painted and written side by side, a few at a time."""

import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data import NotFinite, PictureError, find_pictures, is_picture, is_searched, prepare_picture
from painting.control import check_styles, combine
from painting.pairs import check_outputs
from painting.smoothing import Blender, Motion, MotionTracker, on_grid
from painting.stylizer import Stylizer, decode_in_half, load_input, open_model
from settings import changed
from utils import (
    UserError,
    allow_tf32,
    is_first_process,
    make_folder,
    note,
    progress_bar,
    replacing,
    resolve_device,
)

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
_LEAST_AV = 17
_HD_HEIGHT = 720  # from here on players take colours that a file does not name for BT.709
_AHEAD = 3  # frames that are read and not yet painted; as many are painted and not yet written


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


def _import(module: str, package: str, wanted_by: str):
    """The module, or a UserError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{wanted_by} needs the package {package}; in the toolkit's folder: pip install "
                        "'.[video]'") from error


def _import_av(wanted_by: str):
    """PyAV. Raises UserError where it is not there, or so old that it takes BT.709's colours for BT.601's."""
    av = _import("av", "av", f"{wanted_by}: a video")
    if int(av.__version__.split(".")[0]) < _LEAST_AV:
        raise UserError(f"{wanted_by}: a video needs version {_LEAST_AV} of the package av, or a newer one, not "
                        f"{av.__version__}; in the toolkit's folder: pip install '.[video]'")
    return av


@dataclass
class Frame:
    """One frame on its way from file to file."""

    pixels: np.ndarray  # (H, W, 3), uint8, upright
    time: int  # when it is shown, in units of its clip's time_base
    duration: int  # in the same
    sound: list = field(default_factory=list)  # the packets that stood before it in the file
    motion: Motion | None = None


@dataclass
class Clip:
    """A video to read: what its head says, its frames, and what went wrong while they were read."""

    source: str  # flag and path
    time_base: Fraction  # seconds
    rate: Fraction  # frames a second, on average
    count: int | None = None  # of frames, about
    pixel_aspect: Fraction = Fraction(1)  # width by height
    sound: list = field(default_factory=list)  # its streams, PyAV's
    frames: Iterator[Frame] = iter(())
    late_sound: list = field(default_factory=list)  # packets behind the last frame
    fault: str | None = None  # the first


# ------------------------------------------------------------------------------------------------ reading


@contextmanager
def open_video(path: Path, flag: str, config):
    """The Clip of a video file. config: imsize, cropsize and max_pixels, as for pictures.

    Raises UserError, also while frames are read, for what is no video, has no video stream or too many pixels.
    """
    source = f"{flag} {path}"
    av = _import_av(source)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            container = stack.enter_context(av.open(file, options={"format_whitelist": _READ}))
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
        except av.FFmpegError as error:
            raise UserError(f"{source}: not a readable video ({error.strerror or error})") from error
        streams = [stream for stream in container.streams.video
                   if not stream.disposition & av.stream.Disposition.attached_pic]  # the cover of an album
        if not streams:
            raise UserError(f"{source}: has no video stream")
        stream = streams[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        seconds = Fraction(container.duration or 0, av.time_base)
        clip = Clip(source, stream.time_base, rate, stream.frames or round(seconds * rate) or None,
                    sound=list(container.streams.audio))
        clip.frames = _read_frames(av, container, stream, clip, config)
        yield clip


def _read_frames(av, container, stream, clip: Clip, config) -> Iterator[Frame]:
    """The frames of `stream`, upright and all of one size, and with them the packets of sound."""
    early = max(0, container.start_time or 0)  # of a broadcast; below 0 there is nothing but the lead-in of sound
    start = round(Fraction(early, av.time_base) / clip.time_base)
    has_times = container.format.name not in _WITHOUT_TIMES
    size = matrix = last = None
    end, sound = Fraction(0), []
    for each in _packets_and_frames(av, container, stream, clip):
        if isinstance(each, av.Packet):
            end = max(end, (each.pts + (each.duration or 0)) * each.time_base)
            if each.stream.type == "audio":
                ticks = round(Fraction(early, av.time_base) / each.time_base)
                each.pts, each.dts = each.pts - ticks, each.dts - ticks
                sound.append(each)
            continue
        if size is None:
            matrix = _display_matrix(each)
            size = _scaled_size(each.width, each.height, config, clip.source)
            clip.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            if _turns_sides(matrix):
                clip.pixel_aspect = 1 / clip.pixel_aspect
            if stream.codec_context.color_trc in (_PQ, _HLG):
                note(f"{clip.source}: its high dynamic range is not converted: the frames are painted from pale ones")
        regular = max(1, round(1 / (clip.rate * clip.time_base)))
        if has_times and each.pts is not None:
            shown = each.pts - start
        else:
            shown = 0 if last is None else last.time + last.duration
        last = Frame(_crop(_upright(_to_rgb(each, size), matrix), config.cropsize),
                     shown if last is None else max(shown, last.time + 1),
                     each.duration if has_times and each.duration else regular, sound)
        yield last
        sound = []
    clip.late_sound = sound
    stated = Fraction(early + (container.duration or 0), av.time_base)
    missing = float(stated - end)
    if container.format.name.startswith(_STATE_THEIR_LENGTH) and missing > 0.1 + 1 / clip.rate:
        clip.fault = clip.fault or f"its last {missing:.1f} seconds are missing"


def _packets_and_frames(av, container, stream, clip: Clip) -> Iterator:
    """All packets that have a time, and after each of `stream` the frames that it brings; faults go to `clip`."""

    def decode(packet) -> Iterator:
        try:
            yield from stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            clip.fault = clip.fault or f"parts of it cannot be decoded ({error.strerror})"

    try:
        for packet in container.demux():
            if packet.dts is not None and packet.pts is None:
                packet.pts = packet.dts
            if packet.is_corrupt:
                clip.fault = clip.fault or "a part of it is missing"
                continue
            if packet.dts is not None:
                yield packet
            if packet.stream is stream:
                yield from decode(packet)  # at the end of the file, an empty one has the decoder give what it holds
    except av.FFmpegError as error:
        clip.fault = clip.fault or f"it cannot be read to its end ({error.strerror})"
        yield from decode(None)


def _display_matrix(frame) -> tuple[int, int, int, int]:
    """a, b, c, d of libavutil's display matrix: column and row are to be shown at a * column + c * row and
    b * column + d * row."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return a, b, c, d


def _turns_sides(matrix: tuple[int, int, int, int]) -> bool:
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The frame, (H, W, 3), as it is to be shown: turned by quarters, mirrored."""
    columns, b, c, rows = matrix
    if _turns_sides(matrix):
        pixels, columns, rows = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1]


def _scaled_size(width: int, height: int, config, source: str) -> tuple[int, int]:
    """Width and height that --imsize and --cropsize bring a frame to, before the cut.

    A side stays even or odd, but for the shorter one, which is as --imsize says: most players want even sides.
    """
    shorter = min(width, height)
    side = max(config.imsize or shorter, config.cropsize or 0)

    def scaled(length: int) -> int:
        odd = length % 2
        return side if length == shorter else max(side, 2 * round((length * side / shorter - odd) / 2) + odd)

    for columns, rows in ((width, height), (scaled(width), scaled(height))):
        if columns * rows > config.max_pixels:
            raise UserError(f"{source}: frames of {columns} x {rows} pixels are more than --max_pixels "
                            f"{config.max_pixels}")
    return scaled(width), scaled(height)


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
    paths = sorted(find_pictures(folder, flag), key=natural_order)
    rate = Fraction(config.frame_rate).limit_denominator(100_000)
    clip = Clip(f"{flag} {folder}", 1 / rate, rate, len(paths))

    def read() -> Iterator[Frame]:
        first = None
        for number, path in enumerate(paths):
            try:
                picture = prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
            except PictureError as error:
                reason = str(error)
            else:
                height, width = picture.shape[2:]
                first = first or (height, width)
                if (height, width) == first:
                    yield Frame(picture[0].permute(1, 2, 0).numpy(), number, 1)
                    continue
                reason = f"{path}: {width} x {height} pixels, the first frame has {first[1]} x {first[0]}"
            note(f"skipped {flag} {reason}")
            clip.fault = clip.fault or "the skipped ones cannot be used"

    clip.frames = read()
    yield clip


def natural_order(path: Path) -> list:
    """Sorts frame9 before frame10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if number % 2 else (0, part) for number, part in enumerate(parts)]


# ------------------------------------------------------------------------------------------------ writing


class _Output:
    """A file that remembers why it could not be written: of libavformat one only learns that it could not."""

    def __init__(self, file) -> None:
        self._file, self.seek, self.tell, self.error = file, file.seek, file.tell, None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


class _Writer:
    """Encodes frames into an open file, and copies the packets of sound as they are."""

    def __init__(self, av, file, target: Path, clip: Clip, width: int, height: int) -> None:
        """file: to write to, seekable; target: its name, whose suffix says the format."""
        self._av = av
        container_format, codec, options = VIDEO_FORMATS[target.suffix.lower()]
        self._container = self._av.open(file, "w", format=container_format)
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
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        self._time_base, self._durations = clip.time_base, {}
        self._failed = False
        self._sound = {}
        for stream in clip.sound:
            if _holds(self._av, container_format, stream):
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
        if self._failed:  # the error is on its way, and libavformat may crash where one goes on after it
            return
        self._failed = True
        self.copy(frame.sound)
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.pixels), format="rgb24")
        picture = picture.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = frame.time, self._time_base
        self._durations[frame.time] = frame.duration
        self._encode(picture)
        self._failed = False

    def copy(self, packets: list) -> None:
        """Packets of sound."""
        for packet in packets:
            if packet.stream in self._sound:
                packet.stream = self._sound[packet.stream]
                self._container.mux(packet)

    def finish(self) -> None:
        """Write the frames that the encoder still holds."""
        self._encode(None)

    def _encode(self, picture) -> None:
        for packet in self._stream.encode(picture):
            packet.duration = self._durations.pop(packet.pts, 0)  # the encoder does not say it
            self._container.mux(packet)


def _holds(av, container_format: str, stream) -> bool:
    """Whether a file of that format can hold the packets of `stream` as they are."""
    try:
        with av.open(io.BytesIO(), "w", format=container_format) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


# ----------------------------------------------------------------------------------------------- painting


def paint_video(clip: Clip, target: Path, paint: Callable[[np.ndarray], np.ndarray], stride: int,
                temporal_smoothing: float = 0.0) -> int:
    """Paint every frame of a clip, in order, into the video file `target`, which appears when it is complete.

    paint: (H, W, 3), uint8, to the same; stride: of the grid that it works on, pixels; temporal_smoothing: the share
    in `Blender`, 0 for none. Reading, painting and writing run side by side, with few frames in memory. Returns the
    number of frames. Raises UserError when there is none, or when the video cannot be written.
    """
    av = _import_av(f"--save_path {target}")
    tracker = blender = None
    if temporal_smoothing:
        cv2 = _import("cv2", "opencv-python-headless", "--temporal_smoothing")
        tracker, blender = MotionTracker(cv2, stride), Blender(cv2, temporal_smoothing)
    painted = 0

    def read() -> Iterator[Frame]:
        for frame in clip.frames:
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

    def write_to(file) -> None:
        nonlocal painted
        height, width = first.pixels.shape[:2]
        with _Writer(av, file, target, clip, width, height) as video:

            def write_frame(frame: Frame) -> None:
                if blender is not None:
                    frame.pixels = blender.blend(frame.pixels, frame.motion)
                video.write(frame)

            with ThreadPoolExecutor(1) as writer, progress_bar(clip.count, "stylise", "frame") as bar:
                being_written = deque()
                for frame in chain([first], frames):
                    paint_frame(frame)
                    being_written.append(writer.submit(write_frame, frame))
                    if len(being_written) > _AHEAD:
                        being_written.popleft().result()
                    painted += 1
                    bar.update()
                for each in being_written:
                    each.result()
            video.copy(clip.late_sound)
            video.finish()

    def write(file) -> None:
        output = _Output(file)
        try:
            write_to(output)
        except av.FFmpegError as error:
            raise output.error or UserError(
                f"--save_path {target}: the video cannot be encoded ({error.strerror or error})") from error

    with ThreadPoolExecutor(1) as reader:
        frames = _read_ahead(read(), reader)
        first = next(frames, None)
        if first is None:
            raise UserError(f"{clip.source}: no frame of it can be read" + (f" ({clip.fault})" if clip.fault else ""))
        with replacing(target) as file:
            write(file)
    return painted


def _read_ahead(items: Iterator, reader: ThreadPoolExecutor) -> Iterator:
    """The items, a few of them made in advance by the one thread of `reader`."""
    coming = deque(reader.submit(next, items, None) for _ in range(_AHEAD))
    while (item := coming.popleft().result()) is not None:
        coming.append(reader.submit(next, items, None))
        yield item


# ------------------------------------------------------------------------------------------- in test mode


def makes_video(config) -> bool:
    """Whether test mode is to write a video: its content is one, or --save_path names one."""
    is_named = Path(config.save_path or "").suffix.lower() in VIDEO_FORMATS and not Path(config.save_path).is_dir()
    return is_named or any(map(is_video, config.input("content")[0]))


def stylize_video(config) -> int:
    """Test mode's work where `makes_video`. config: its settings.

    Returns the exit code, 1 where not every frame could be read. Raises UserError for what the user can put right.
    """
    if not is_first_process():  # one file, one process
        return 0
    (contents, content_flag), (styles, style_flag) = (config.input(kind) for kind in ("content", "style"))
    target = _check(config, contents, f"--{content_flag}", styles, f"--{style_flag}")
    content = Path(contents[0])
    no_effect = ["holdout", "pairs", "skip_existing", "seed", "vgg_weights", "style_loss"]
    no_effect += ["frame_rate"] * (not is_searched(content))
    for flag in (flag for flag in no_effect if flag in changed(config)):
        note(f"--{flag} has no effect on a video")
    (strength,) = config.style_strength
    device = resolve_device(config.gpu_no)
    allow_tf32(False)
    network, _ = open_model(config.load_path[0], config.swap_max_pool, config.backbone)
    stylizer = Stylizer(network, device=device, upsampling=config.upsampling, tile=config.tile)
    if config.amp == "auto":
        decode_in_half(stylizer, config.load_path[0])
    of_styles = replace(config, imsize=config.style_size or config.imsize)
    code = combine([stylizer.encode_style(load_input(Path(style), of_styles, style_flag)) for style in styles],
                   config.style_weights, None)
    keeps_colors = config.preserve_color == "luma"

    def paint(pixels: np.ndarray) -> np.ndarray:
        frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        try:
            return np.asarray(stylizer.paint_picture(frame, code, strength, keeps_colors=keeps_colors))
        except NotFinite as error:
            raise UserError(f"--load_path {config.load_path[0]}: its picture of a frame has values that are not "
                            "finite") from error

    make_folder(target.parent, "--save_path")
    opened = open_frames if is_searched(content) else open_video
    with opened(content, f"--{content_flag}", config) as clip:
        frames = paint_video(clip, target, paint, network.config.stride, config.temporal_smoothing)
    note(f"wrote {frames} frames to {target}")
    if clip.fault is None:
        return 0
    note(f"{clip.source}: damaged or cut short ({clip.fault}): only the frames that could be read are painted")
    return 1


def _check(config, contents: Sequence[str], content_flag: str, styles: Sequence[str], style_flag: str) -> Path:
    """The video file to write. Raises UserError for what cannot be made a video, or is more than one."""
    if len(contents) > 1:
        raise UserError(f"{content_flag} {' '.join(contents)}: a video is made of one content")
    if config.mask is not None:
        raise UserError("--mask: it is of a picture, and things move in a video")
    if len(styles) > 1 and config.style_weights is None:
        raise UserError(f"{style_flag} {' '.join(styles)}: a video is painted in one style, or with --style_weights in "
                        "a mixture")
    if config.preserve_color == "histogram":
        raise UserError("--preserve_color histogram: the style would change with every frame of a video; luma does not")
    check_styles(len(styles), config.style_weights, None)
    content = Path(contents[0])
    if len(config.load_path) > 1:
        raise UserError(f"--load_path {' '.join(config.load_path)}: a video is painted by one model")
    if len(config.style_strength) > 1:
        raise UserError(f"--style_strength {' '.join(map(str, config.style_strength))}: a video is painted at one")
    if config.metrics is not None:
        raise UserError("--metrics: they are of pictures, not of a video")
    for style in styles:
        if is_searched(style):
            raise UserError(f"{style_flag} {style}: is a folder; a video takes one style picture")
        if is_video(style):
            raise UserError(f"{style_flag} {style}: is a video; a picture is needed")
    if content.exists() and not is_searched(content) and not is_video(content):
        raise UserError(f"--save_path {config.save_path}: a video is made of a video or of a folder of frames; "
                        f"{content_flag} {content} is neither")
    if not content.exists():
        raise UserError(f"{content_flag} {content}: no such file")
    target = config.output
    if config.save_path is None:
        target = target.with_suffix(".mp4")
    elif config.save_path.endswith(("/", os.sep)) or target.is_dir():
        target = target / f"{content.stem}_{'-'.join(Path(style).stem for style in styles)}.mp4"
    if target.suffix.lower() not in VIDEO_FORMATS:
        raise UserError(f"--save_path {target}: a video is written to {' '.join(VIDEO_FORMATS)}, or into a folder, "
                        "whose name ends with /")
    read = [(content_flag, content), *((style_flag, Path(style)) for style in styles),
            ("--load_path", Path(config.load_path[0]))]
    check_outputs([target], (), (), read, target)
    return target
