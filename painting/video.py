"""Video in, video out: while a frame is painted, the next one is read and the one before it is written."""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data import PictureError, load_picture
from folders import find_pictures, is_searched
from painting.control import check_styles
from painting.pairs import check_outputs
from painting.stylizer import load_input, make_stylizers, open_models
from utils import UserError, import_extra, make_folder, note, progress_bar, replacing

# Container, encoder and its settings, by the suffix of a file to write. Quick enough to keep up with a small network.
_H264 = ("libx264", {"preset": "superfast", "crf": "18"})
_VP9 = ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "7", "row-mt": "1", "crf": "24", "b": "0"})
VIDEO_FORMATS = {".mp4": ("mp4", *_H264), ".m4v": ("mp4", *_H264), ".mov": ("mov", *_H264),
                 ".mkv": ("matroska", *_H264), ".webm": ("webm", *_VP9)}
_SUFFIXES = (*VIDEO_FORMATS, ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv", ".mxf")
# What libavformat may take a file for: formats of one file alone. A playlist could name any other, or an address.
_READ = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf,dv,nut,ivf"
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo")  # a frame's number says when it is shown
_STATE_THEIR_LENGTH = ("mov", "matroska")  # at their beginning, which a file that is cut short still has
_UNSPECIFIED, _BT709, _LIMITED, _PQ, _HLG = 2, 1, 1, 16, 18  # in libavutil: colours, their range, transfer functions
_HD_HEIGHT = 720  # from here on players take colours that a file does not name for BT.709


@dataclass
class Frame:
    """One frame on its way from file to file."""

    pixels: np.ndarray  # (H, W, 3), uint8, upright
    time: int  # when it is shown, in units of its clip's time_base
    duration: int  # in the same


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
    fault: str | None = None  # the first


# ------------------------------------------------------------------------------------------------ reading


@contextmanager
def open_video(path: Path, flag: str, config):
    """The Clip of a video file. config: imsize, cropsize and max_pixels, as for pictures.

    Raises UserError, also while frames are read, for what is no video, has no video stream or too many pixels.
    """
    source = f"{flag} {path}"
    av = import_extra("av", "video", source)
    try:
        container = av.open(f"file:{path}", options={"format_whitelist": _READ})
    except av.FFmpegError as error:
        raise UserError(f"{source}: not a readable video ({error.strerror or error})") from error
    with container:
        cover = av.stream.Disposition.attached_pic  # of an album
        stream = next((each for each in container.streams.video if not each.disposition & cover), None)
        if stream is None or stream.codec_context is None:
            raise UserError(f"{source}: has no video stream{'' if stream is None else ' that can be decoded'}")
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        count = stream.frames or round(Fraction(container.duration or 0, av.time_base) * rate) or None
        clip = Clip(source, stream.time_base, rate, count, sound_streams=list(container.streams.audio))
        clip.frames = _read_frames(av, container, stream, clip, config)
        yield clip


def _read_frames(av, container, stream, clip: Clip, config) -> Iterator[Frame]:
    """The frames of `stream`, upright and all of one size."""
    # Of a broadcast, which begins at some time of day; below 0 there is nothing but the lead-in of sound.
    start = Fraction(max(0, container.start_time or 0), av.time_base)
    has_times = container.format.name not in _WITHOUT_TIMES
    regular = max(1, round(1 / (clip.rate * clip.time_base)))
    last = None
    for frame in _decode(av, container, stream, clip, start):
        if last is None:
            size = _scaled_size(frame.width, frame.height, config, clip.source)
            aspect = stream.sample_aspect_ratio or Fraction(1)
            clip.pixel_aspect = 1 / aspect if frame.rotation % 180 else aspect  # what was a row is a column
            if stream.codec_context.color_trc in (_PQ, _HLG):
                note(f"{clip.source}: its high dynamic range is not converted: the frames are painted from pale ones")
        shown = last.time + last.duration if last else 0
        if has_times and frame.pts is not None:
            shown = frame.pts - round(start / clip.time_base)
        shown = max(shown, last.time + 1) if last else shown
        pixels = np.rot90(_to_rgb(frame, size), frame.rotation // 90)
        if config.cropsize is not None:
            top, left = ((length - config.cropsize) // 2 for length in pixels.shape[:2])
            pixels = pixels[top : top + config.cropsize, left : left + config.cropsize]
        last = Frame(np.ascontiguousarray(pixels), shown, frame.duration if has_times and frame.duration else regular)
        yield last


def _decode(av, container, stream, clip: Clip, start: Fraction) -> Iterator:
    """The frames of `stream`, PyAV's. Packets of sound, counted from `start`, in seconds, and faults go to the clip."""
    end = Fraction(0)
    try:
        for packet in container.demux():  # at the end of the file, an empty one has the decoder give what it holds
            if packet.is_corrupt:
                clip.fault = clip.fault or "a part of it is missing"
                continue
            if packet.dts is not None:
                packet.pts = packet.dts if packet.pts is None else packet.pts
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.type == "audio":
                    ticks = round(start / packet.time_base)
                    packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                    clip.sound.append(packet)
            if packet.stream is stream:
                try:
                    yield from stream.codec_context.decode(packet)
                except av.FFmpegError as error:
                    clip.fault = clip.fault or f"parts of it cannot be decoded ({error.strerror})"
    except av.FFmpegError as error:
        clip.fault = clip.fault or f"it cannot be read to its end ({error.strerror})"
    missing = float(start + Fraction(container.duration or 0, av.time_base) - end)
    if container.format.name.startswith(_STATE_THEIR_LENGTH) and missing > 0.1 + 1 / clip.rate:
        clip.fault = clip.fault or f"its last {missing:.1f} seconds are missing"


def _scaled_size(width: int, height: int, config, source: str) -> tuple[int, int]:
    """Width and height that --imsize and --cropsize bring a frame to, before the cut. A longer side becomes even where
    it is scaled: most players want even sides."""
    shorter, longer = sorted((width, height))
    side = max(config.imsize or shorter, config.cropsize or 0)
    if side != shorter:
        longer = max(side, 2 * round(longer * side / shorter / 2))
    scaled = (longer, side) if width > height else (side, longer)
    if max(width * height, longer * side) > config.max_pixels:
        raise UserError(f"{source}: frames of {width} x {height} pixels, or as --imsize scales them, are more than "
                        f"--max_pixels {config.max_pixels}")
    return scaled


def _to_rgb(frame, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), uint8, of PyAV's frame at another size, (width, height)."""
    unnamed = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_HEIGHT
    return frame.reformat(*size, "rgb24", src_colorspace="ITU709" if unnamed else None,
                          interpolation="BICUBIC").to_ndarray()


@contextmanager
def open_frames(folder: Path, flag: str, config):
    """The Clip of a folder or archive of pictures, in the order of the numbers in their names, at `config.frame_rate`.

    A picture that cannot be used, or is of another size than the first, is skipped: the one before it stays. Raises
    UserError as `find_pictures` does.
    """
    paths = sorted(find_pictures(folder, f"--{flag}"), key=lambda path: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))])  # frame9 before frame10
    rate = Fraction(config.frame_rate).limit_denominator(100_000)
    clip = Clip(f"{flag} {folder}", 1 / rate, rate, len(paths))

    def read() -> Iterator[Frame]:
        size = None
        for number, path in enumerate(paths):
            try:
                picture = load_picture(path, config.imsize, config.cropsize, config.max_pixels)
                size = size or picture.size
                if picture.size != size:
                    raise PictureError(f"{path}: {picture.width} x {picture.height} pixels, the first frame has "
                                       f"{size[0]} x {size[1]}")
                yield Frame(np.asarray(picture), number, 1)
            except PictureError as error:
                note(f"skipped {error}")
                clip.fault = "the skipped ones cannot be used"

    clip.frames = read()
    yield clip


# ------------------------------------------------------------------------------------- painting and writing


def paint_video(clip: Clip, target: Path, paint: Callable[[np.ndarray], np.ndarray], stride: int,
                temporal_smoothing: float = 0.0) -> int:
    """Paint every frame of a clip, in order, into the video file `target`, which appears when it is complete.

    paint: (H, W, 3), uint8, to the same; stride: of the grid that it works on, pixels; temporal_smoothing: the share
    in `Blender`, 0 for none. Returns the number of frames. Raises UserError when there is none, or when the video
    cannot be written.
    """
    av = import_extra("av", "video", f"save_path {target}")
    with ThreadPoolExecutor(2) as threads, replacing(target) as file:
        if temporal_smoothing:
            smoothing = import_extra("painting.smoothing", "video", "temporal_smoothing")  # which needs OpenCV
            tracker, blender = smoothing.MotionTracker(stride), smoothing.Blender(temporal_smoothing)
            read = _ahead(((frame, tracker.follow(frame.pixels)) for frame in clip.frames), threads)
            painted = _ahead(((frame, motion, smoothing.paint_on_grid(frame.pixels, motion, stride, paint))
                              for frame, motion in read), threads)
            frames = (replace(frame, pixels=blender.blend(pixels, motion)) for frame, motion, pixels in painted)
        else:
            read = _ahead(clip.frames, threads)
            frames = _ahead((replace(frame, pixels=paint(frame.pixels)) for frame in read), threads)
        try:
            return _write(av, frames, clip, target, file.name)
        except av.FFmpegError as error:
            raise UserError(f"save_path {target}: the video cannot be written ({error.strerror or error})") from error


def _ahead(items: Iterator, threads: ThreadPoolExecutor) -> Iterator:
    """The items; while one is worked on, a thread makes the next."""
    coming = threads.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = threads.submit(next, items, None)
        yield item


def _write(av, frames: Iterator[Frame], clip: Clip, target: Path, path: str) -> int:
    """Encode the frames into the file at `path`, and copy the clip's packets of sound as they are. target: the file's
    later name, whose suffix says the format. Returns the number of frames."""
    first = next(frames, None)
    if first is None:
        raise UserError(f"{clip.source}: no frame of it can be read" + (f" ({clip.fault})" if clip.fault else ""))
    with av.open(f"file:{path}", "w", format=VIDEO_FORMATS[target.suffix.lower()][0]) as container:
        stream = _add_pictures(av, container, clip, target, *first.pixels.shape[1::-1])
        sound = {}  # PyAV's new stream for each of the clip's streams of sound that the container can hold
        for old in clip.sound_streams:
            if old.codec_context and old.codec_context.codec.canonical_name in container.supported_codecs:
                sound[old] = container.add_stream_from_template(old)
                sound[old].metadata.update(old.metadata)
            else:
                note(f"{clip.source}: its sound ({old.codec_context.name}) is left out: {target.suffix} files cannot "
                     "hold it as it is; .mkv can" if old.codec_context else
                     f"{clip.source}: a track of sound of an unknown kind is left out")

        written = 0
        with progress_bar(clip.count, "stylise", "frame") as bar:
            for frame in chain([first], frames, [None]):
                while clip.sound:
                    packet = clip.sound.popleft()
                    if packet.stream in sound:
                        packet.stream = sound[packet.stream]
                        container.mux(packet)
                picture = None  # for which, at the end, the encoder gives what it still holds
                if frame is not None:
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.pixels), format="rgb24")
                    picture = picture.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
                    picture.pts, picture.time_base, picture.duration = frame.time, clip.time_base, frame.duration
                    bar.update()
                    written += 1
                container.mux(stream.encode(picture))
    return written


def _add_pictures(av, container, clip: Clip, target: Path, width: int, height: int):
    """PyAV's new stream for frames of this size."""
    _, codec, options = VIDEO_FORMATS[target.suffix.lower()]
    keeps_colors = codec == "libx264" and (width % 2 or height % 2)  # H.264 halves the colours of even sides only
    if keeps_colors:
        note(f"{target}: {width} x {height} pixels have an odd side, so colours are kept in full (yuv444p), which some "
             "players cannot show; .webm can do without")
    stream = container.add_stream(
        codec, rate=clip.rate, options=options, width=width, height=height, time_base=clip.time_base,
        pix_fmt="yuv444p" if keeps_colors else "yuv420p", sample_aspect_ratio=clip.pixel_aspect, colorspace=_BT709,
        color_primaries=_BT709, color_trc=_BT709, color_range=_LIMITED)
    stream.codec_context.flags |= av.codec.context.Flags.frame_duration
    return stream


# ------------------------------------------------------------------------------------------- in test mode


def makes_video(config) -> bool:
    """Whether test mode is to write a video: its content is a file that is named as one, or --save_path names one."""
    is_named = Path(config.save_path or "").suffix.lower() in VIDEO_FORMATS and not Path(config.save_path).is_dir()
    contents = map(Path, config.input("content")[0])
    return is_named or any(path.suffix.lower() in _SUFFIXES and path.is_file() for path in contents)


def check_video(config) -> Path:
    """The video file to write. Raises UserError for what cannot be made a video, or is more than one."""
    (contents, content_flag), (styles, style_flag) = (config.input(kind) for kind in ("content", "style"))
    for flag, values in ((content_flag, contents), ("load_path", config.load_path),
                         ("style_strength", config.style_strength), (style_flag, styles)):
        if len(values) > 1 and not (flag == style_flag and config.style_weights):
            raise UserError(f"{flag} {' '.join(map(str, values))}: a video takes one; --style_weights mixes styles")
    for flag in ("mask", "metrics"):
        if getattr(config, flag) is not None:
            raise UserError(f"{flag}: it is of pictures, not of a video")
    if config.preserve_color == "histogram":
        raise UserError("preserve_color histogram: the style would change with every frame of a video; luma does not")
    check_styles(len(styles), config.style_weights, None)
    content, target = Path(contents[0]), config.output
    if config.save_path is None:
        target = target.with_suffix(".mp4")
    elif config.names_a_folder:
        target = target / f"{content.stem}_{'-'.join(Path(style).stem for style in styles)}.mp4"
    if target.suffix.lower() not in VIDEO_FORMATS:
        raise UserError(f"save_path {target}: a video is written to {' '.join(VIDEO_FORMATS)}, or into a folder, "
                        "whose name ends with /")
    check_outputs(config, [target])
    return target


def stylize_video(config, device: torch.device) -> int:
    """Test mode's work where `makes_video`. config: a TestConfig. Returns the exit code, 1 where not every frame could
    be read. Raises UserError for what the user can put right."""
    target = check_video(config)
    (stylizer,) = make_stylizers(config, open_models(config), device).values()
    (contents, content_flag), (styles, style_flag) = (config.input(kind) for kind in ("content", "style"))
    content, (strength,), keeps_colors = Path(contents[0]), config.style_strength, config.preserve_color == "luma"
    of_styles = replace(config, imsize=config.style_size or config.imsize)
    style = stylizer.combine([load_input(Path(each), of_styles, style_flag) for each in styles], config.style_weights)

    def paint(pixels: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(stylizer.paint_picture(pixels, style, strength, keeps_colors=keeps_colors))
        except UserError as error:  # not finite
            raise UserError(f"load_path {config.load_path[0]}: {error}") from error

    make_folder(target.parent, "save_path")
    opened = open_frames if is_searched(content) else open_video
    with opened(content, content_flag, config) as clip:
        frames = paint_video(clip, target, paint, stylizer.network.config.stride, config.temporal_smoothing)
    note(f"wrote {frames} frames to {target}")
    if clip.fault:
        note(f"{clip.source}: damaged or cut short ({clip.fault}): only the frames that could be read are painted")
    return 1 if clip.fault else 0
