"""Videos: nothing but the paint changes; damaged ones, and what is none; less flicker, and no ghosts for it."""

import resource
import struct
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, refusal, small_network, user_error, within_range, words, write_model, write_noise
from PIL import Image

from data import denormalize, to_pil
from evaluate import TestConfig
from folders import is_searched
from main import main
from painting import video
from painting.smoothing import Blender, MotionTracker, paint_on_grid
from painting.stylizer import Stylizer

NOTHING = TestConfig(gpu_no=-1)  # settings that change no frame


def ramps(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(height, width, 3), uint8: red grows to the right, green downwards, blue with the frame's number."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 240, width), np.linspace(0, 240, height)[:, None]
    pixels[..., 2] = 20 * number
    return pixels


def write_clip(path: Path, frames, times=None, rate=10, sound=True, options=None, aspect=None) -> Path:
    """A video of the frames at `times`, in tenths of a second, and with `sound` as much noise, as AAC."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.sample_aspect_ratio = aspect or 1
        voice = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, (pixels, time) in enumerate(zip(frames, times or range(len(frames)))):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(picture))
            if sound:
                noise = (8000 * generator.standard_normal((1, 1600))).astype(np.int16)
                samples = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
                samples.sample_rate, samples.pts = 16000, 1600 * number
                container.mux(voice.encode(samples))
        container.mux(stream.encode())
        if sound:
            container.mux(voice.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        voice = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        samples.sample_rate = 16000
        container.mux([*voice.encode(samples), *voice.encode()])
    return path


def cut_short(path: Path, kept: float) -> Path:
    """The first part of a file, as a file beside it."""
    content = path.read_bytes()
    short = path.with_stem("short")
    short.write_bytes(content[: int(len(content) * kept)])
    return short


def read_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]


def read_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def read_sound(path: Path) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        return [(packet.pts * packet.time_base, bytes(packet))
                for packet in container.demux() if packet.size and packet.stream.type == "audio"]


def describe(path: Path) -> tuple:
    """Width, height, frame rate and length in seconds of the video stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        length = None if stream.duration is None else stream.duration * stream.time_base
        return stream.width, stream.height, stream.average_rate, length


def repaint(source: Path, target: Path, paint=lambda pixels: pixels, config=NOTHING, smoothing=0.0) -> int:
    opened = video.open_frames if is_searched(source) else video.open_video
    with opened(source, "content", config) as clip:
        return video.paint_video(clip, target, paint, 8, smoothing)


def distance(one, other) -> float:
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", map(ramps, range(10)),
                      options={"movflags": "faststart"})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict:
    """A command line of a narrow network whose pictures are not clipped, and of a style."""
    folder = tmp_path_factory.mktemp("model")
    return {"mode": "test", "gpu_no": -1, "style": write_noise(folder / "style.png", (24, 32), 1),
            "load_path": write_model(folder / "narrow.pth", within_range(small_network()))}


# ------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("source, suffix", [(".mp4", ".mp4"), (".mp4", ".mkv"), (".mkv", ".mov"), (".mkv", ".mkv"),
                                            (".mp4", ".webm")])
def test_frames_size_times_rate_and_sound_are_kept(tmp_path, capsys, source, suffix):
    """Sound packet by packet; where the container cannot hold it, that is said."""
    given, target = write_clip(tmp_path / f"clip{source}", map(ramps, range(10))), tmp_path / f"out{suffix}"
    assert repaint(given, target) == 10
    assert {*tmp_path.iterdir()} == {given, target} and describe(target)[:3] == (64, 48, 10)
    times = read_times(target)  # .mkv and .webm begin with the lead-in of the sound
    assert [time - times[0] for time in times] == [Fraction(number, 10) for number in range(10)]
    assert times[0] == 0 or suffix in (".mkv", ".webm")
    for actual, number in zip(read_frames(target), range(10)):
        assert distance(actual, ramps(number)) < 3, number
    if suffix == ".webm":
        assert "its sound (aac) is left out: .webm files cannot hold it" in capsys.readouterr().err
        assert read_sound(target) == []
        return
    (given_times, given_packets), (sound_times, packets) = (zip(*read_sound(path)) for path in (given, target))
    assert packets == given_packets and len(packets) > 10
    apart, given_apart = ([float(time - read_times(path)[0]) for time in each]
                          for each, path in ((sound_times, target), (given_times, given)))
    assert apart == pytest.approx(given_apart, abs=1e-3)  # .mkv counts milliseconds


@pytest.mark.parametrize("suffix, times", [(".mp4", [0, 1, 2, 6, 7, 15, 16, 30]), (".avi", [*range(10)])])
def test_times_are_kept_and_frames_without_are_evenly_spaced(tmp_path, suffix, times):
    given = write_clip(tmp_path / f"clip{suffix}", map(ramps, range(len(times))), times, sound=False)
    target = tmp_path / "out.mp4"
    repaint(given, target)
    assert read_times(target) == [Fraction(time, 10) for time in times]
    assert suffix == ".avi" or read_times(target) == read_times(given) and describe(target) == describe(given)


def test_broadcast_begins_at_0_with_its_sound(tmp_path):
    """An MPEG-TS file begins at some time of day; sound and picture keep their distance."""
    given = write_clip(tmp_path / "clip.ts", map(ramps, range(10)))
    repaint(given, tmp_path / "out.mp4")
    times, given_times = read_times(tmp_path / "out.mp4"), read_times(given)
    assert given_times[0] > Fraction(1, 10) > times[0]
    apart = read_sound(tmp_path / "out.mp4")[3][0] - times[0]
    assert float(apart) == pytest.approx(float(read_sound(given)[3][0] - given_times[0]), abs=1e-3)
    assert np.allclose(np.diff(np.array(times, float)), 0.1)


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_display_matrix_is_honoured(tmp_path, matrix, turns):
    """turns: quarters, counter-clockwise."""
    given = write_clip(tmp_path / "clip.mp4", map(ramps, range(3)), sound=False, aspect=Fraction(4, 3))
    content = bytearray(given.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    given.write_bytes(content)
    repaint(given, tmp_path / "out.mp4")
    desired = np.rot90(ramps(1), turns)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = list(container.decode(video=0))[1]
        aspect = container.streams.video[0].sample_aspect_ratio
    assert aspect == (Fraction(4, 3) if turns == 2 else Fraction(3, 4)) and frame.rotation == 0
    assert (frame.height, frame.width) == desired.shape[:2]
    assert distance(frame.to_ndarray(format="rgb24"), desired) < 3


@pytest.mark.parametrize("suffix, colours", [(".mp4", "yuv444p"), (".webm", "yuv420p")])
def test_odd_sides_are_kept(tmp_path, capsys, suffix, colours):
    given = write_clip(tmp_path / "clip.mkv", (ramps(number, 63, 47) for number in range(3)), sound=False)
    target = tmp_path / f"out{suffix}"
    repaint(given, target)
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt) == (63, 47, colours)
    assert distance(read_frames(target)[2], ramps(2, 63, 47)) < 3
    assert ("63 x 47 pixels have an odd side" in capsys.readouterr().err) == (colours == "yuv444p")


@pytest.mark.parametrize("height, yuv", [(48, (81, 90, 240)), (720, (63, 102, 240))], ids=["BT.601", "BT.709"])
def test_colours_that_a_file_does_not_name(height, yuv):
    """Red as small and as large videos have it, where the file does not say how its colours are coded."""
    planes = np.stack([np.full((height, 16), value, np.uint8) for value in yuv])
    frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
    assert distance(video._to_rgb(frame, (16, height)), np.broadcast_to((255, 0, 0), (height, 16, 3))) < 2


@pytest.mark.parametrize("size, settings, desired", [
    ((1920, 1080), {"imsize": 512}, (910, 512)), ((640, 360), {"imsize": 202}, (360, 202)),  # 359.1
    ((360, 641), {"imsize": 202}, (202, 360)),  # 359.7
    ((65, 65), {"imsize": 32}, (32, 32)), ((65, 47), {"imsize": 47}, (65, 47)),  # not scaled
    ((64, 48), {"imsize": 96, "cropsize": 50}, (128, 96)), ((64, 48), {"cropsize": 56}, (74, 56)),
])
def test_scaled_sides_are_even(size, settings, desired):
    assert video._scaled_size(*size, TestConfig(**settings), "") == desired
    pixels = max(size[0] * size[1], desired[0] * desired[1])
    message = user_error(video._scaled_size, *size, TestConfig(max_pixels=pixels - 1, **settings), "content x")
    assert f"{size[0]} x {size[1]} pixels, or as --imsize scales them, are more than --max_pixels" in message


# --------------------------------------------------------------------------------------- the command line


def test_every_frame_is_painted_as_a_picture_is(clip, model, tmp_path, capsys):
    """Two styles mixed, of another size, in the content's colours, in tiles, into a new folder."""
    other = write_noise(tmp_path / "other.png", (40, 40), 5)
    flags = model | {"content": clip, "style": [model["style"], other], "style_weights": [0.25, 0.75], "style_size": 20,
                     "preserve_color": "luma", "tile": 128, "imsize": 42, "cropsize": 40, "style_strength": 0.9}
    assert main(words(flags | {"save_path": f"{tmp_path}/new/"})) == 0
    target = tmp_path / "new" / "clip_style-other.mp4"
    assert f"wrote 10 frames to {target}" in capsys.readouterr().err
    stylizer = Stylizer(model["load_path"], device=CPU)
    with av.open(str(clip)) as container:
        for actual, frame in zip(read_frames(target), container.decode(video=0), strict=True):
            pixels = frame.to_ndarray(format="rgb24", width=56, height=42, interpolation="BICUBIC")[1:41, 8:48]
            desired = stylizer.stylize(pixels, flags["style"], style_weights=[0.25, 0.75], style_size=20,
                                       preserve_color="luma", strength=0.9)
            assert actual.shape == (40, 40, 3) and distance(actual, desired) < 6
    assert distance(desired, stylizer.stylize(pixels, model["style"])) > 12  # the flags make a difference


def test_folder_of_frames(model, tmp_path, capsys):
    for number in (1, 2, 10, 11):
        Image.fromarray(ramps(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame3.png").write_bytes(b"no picture")
    Image.fromarray(ramps(4, 32, 32)).save(tmp_path / "frame4.png")
    flags = model | {"content": tmp_path, "frame_rate": "30000/1001", "save_path": tmp_path / "out.mp4",
                     "temporal_smoothing": 0.5}
    assert main(words(flags)) == 1
    said = capsys.readouterr().err
    assert "frame3.png: not a readable picture" in said and "frame4.png: 32 x 32 pixels, the first" in said
    assert "wrote 4 frames" in said
    frame = Fraction(1001, 30000)
    assert read_times(tmp_path / "out.mp4") == [0, frame, 4 * frame, 5 * frame]
    with zipfile.ZipFile(tmp_path / "frames.zip", "w") as archive:
        for path in tmp_path.glob("*.png"):
            archive.write(path, path.name)
    for source in (tmp_path, tmp_path / "frames.zip"):
        repaint(source, tmp_path / "plain.mkv", config=NOTHING)
        assert [round(pixels[..., 2].mean() / 20) for pixels in read_frames(tmp_path / "plain.mkv")] == [1, 2, 10, 11]


def test_tracks_of_an_unknown_kind(clip, model, tmp_path, capsys):
    """As phones write them beside the known ones: sound is left out, a video is refused."""
    deaf, blind = tmp_path / "deaf.mp4", tmp_path / "blind.mp4"
    deaf.write_bytes(write_clip(tmp_path / "a.mp4", map(ramps, range(3))).read_bytes()
                     .replace(b"mp4a", b"apac").replace(b"esds", b"dapa"))
    assert main(words(model | {"content": deaf, "save_path": tmp_path / "out.mp4"})) == 0
    assert "a track of sound of an unknown kind is left out" in capsys.readouterr().err
    assert len(read_frames(tmp_path / "out.mp4")) == 3 and read_sound(tmp_path / "out.mp4") == []
    blind.write_bytes(clip.read_bytes().replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    assert main(words(model | {"content": blind, "save_path": tmp_path / "none.mp4"})) == 2
    assert "blind.mp4: has no video stream that can be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_video_cut_short_gives_what_could_be_read(model, tmp_path, capsys, suffix):
    whole = write_clip(tmp_path / f"clip{suffix}", map(ramps, range(12)), options={"movflags": "faststart"})
    short = cut_short(whole, 0.7)
    assert main(words(model | {"content": short, "save_path": tmp_path / "out.mp4"})) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged or cut short" in line]
    assert len(said) == 1 and str(short) in said[0]
    assert 2 <= len(read_frames(tmp_path / "out.mp4")) < 12
    assert main(words(model | {"content": whole, "save_path": tmp_path / "out.mp4"})) == 0
    assert "damaged" not in capsys.readouterr().err and len(read_frames(tmp_path / "out.mp4")) == 12


def test_what_cannot_be_made_a_video_is_refused_in_one_line(clip, model, tmp_path, capsys):
    before = clip.read_bytes()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n")  # a playlist may lead anywhere
    picture = write_noise(tmp_path / "picture.png", (24, 32), 0)
    refused = {  # flags by what the line says
        "has no video stream": {"content": write_sound(tmp_path / "sound.mp4")},
        "noise.mp4: not a readable video": {"content": tmp_path / "noise.mp4"},
        "empty.mkv: not a readable video": {"content": tmp_path / "empty.mkv"},
        "list.mp4: not a readable video": {"content": tmp_path / "list.mp4"},
        "head.mp4: ": {"content": cut_short(clip, 0.01).rename(tmp_path / "head.mp4")},
        "none.mp4: not a readable video (No such file": {"content": tmp_path / "none.mp4"},
        "out.png: a video is written to .mp4": {"save_path": tmp_path / "out.png"},
        "out.avi: a video is written to .mp4": {"save_path": tmp_path / "out.avi"},
        "would overwrite --content": {"save_path": clip},
        "picture.png: not a readable video": {"content": picture},
        "--metrics: it is of pictures": {"metrics": "ssim"},
        "not a file, but a folder": {"style": tmp_path},
        f"--style {clip}: not a readable picture": {"style": clip},
        "--load_path a.pth b.pth: a video takes one": {"load_path": ["a.pth", "b.pth"]},
        "more than --max_pixels": {"max_pixels": 1000},
        "a video takes one; --style_weights mixes styles": {"style": [picture, picture]},
        "clip.mp4: a video takes one": {"content": [clip, clip]},
        "1 for 2 style(s)": {"style": [picture, picture], "style_weights": 1},
        "--mask: it is of pictures": {"mask": picture, "style": picture},
        "--preserve_color histogram": {"preserve_color": "histogram"},
        "--tile 8": {"tile": 8},
    }
    for message, flags in refused.items():
        assert message in refusal(capsys, *words(model | {"content": clip, "save_path": tmp_path / "out.mp4"} | flags))
        assert not list(tmp_path.glob("*out*")), message
    assert clip.read_bytes() == before


@pytest.mark.parametrize("module", ["av", "cv2"])
def test_package_that_is_not_there(clip, model, tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "painting.smoothing")
    flags = model | {"content": clip, "save_path": tmp_path / "out.mp4", "temporal_smoothing": 0.5}
    line = refusal(capsys, *words(flags))
    assert module in line and "in the toolkit's folder: pip install '.[video]'" in line
    assert not list(tmp_path.iterdir())


def test_flags_without_effect_are_said(clip, model, tmp_path, capsys):
    assert main(words(model | {"content": clip, "save_path": tmp_path / "out.mp4", "pairs": 1})) == 0
    said = capsys.readouterr().err
    assert "--pairs has no effect on a video" in said
    picture = write_noise(tmp_path / "picture.png", (24, 32), 0)
    assert main(words(model | {"content": picture, "save_path": tmp_path / "out.png", "temporal_smoothing": 0.5})) == 0
    assert "--temporal_smoothing has no effect on pictures" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- on the way there


@pytest.mark.parametrize("room", [0, 3000])
def test_full_disk_is_said(tmp_path, capsys, room):
    """A true failing write: this process may write files of so many bytes for a moment."""
    given = write_clip(tmp_path / "clip.mp4", [texture(number, 128) for number in range(10)])
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most[1]))
    try:
        message = user_error(repaint, given, tmp_path / "out.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert message == f"save_path {tmp_path / 'out.mp4'}: the video cannot be written (File too large)"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_few_frames_are_in_memory(tmp_path):
    """While a frame is painted, at most one other has been read and not painted."""
    given = write_clip(tmp_path / "clip.mkv", (ramps(number % 12, 32, 32) for number in range(40)), sound=False)
    read, ahead = [], []
    with video.open_video(given, "content", NOTHING) as clip:
        frames = clip.frames
        clip.frames = (read.append(None) or frame for frame in frames)
        assert video.paint_video(clip, tmp_path / "out.mkv", lambda pixels: ahead.append(len(read)) or pixels, 8) == 40
    assert max(count - number for number, count in enumerate(ahead)) <= 2


# ------------------------------------------------------------------------------------------------ flicker


def texture(seed: int = 0, side: int = 200) -> np.ndarray:
    """(side, side, 3), uint8: soft blots of many sizes."""
    noise = np.random.default_rng(seed).standard_normal((side, side, 3)).astype(np.float32)
    blots = sum(cv2.GaussianBlur(noise, (0, 0), size) * size for size in (2, 4, 8))
    return np.clip(128 + 90 * blots, 0, 255).astype(np.uint8)


def painted_frames(tmp_path, monkeypatch, frames, paint, smoothing: float) -> list[np.ndarray]:
    """What is encoded: `frames` painted and smoothed."""
    written = []
    monkeypatch.setattr(video, "_write", lambda _, frames, *more: written.extend(
        each.pixels.astype(int) for each in frames))
    clip = video.Clip("content x", Fraction(1, 10), Fraction(10), frames=(
        video.Frame(np.ascontiguousarray(pixels), number, 1) for number, pixels in enumerate(frames)))
    video.paint_video(clip, tmp_path / "out.mkv", paint, 8, smoothing)
    return written


@pytest.fixture(scope="module")
def paint():
    """Painting by the tiny model, (H, W, 3), uint8."""
    stylizer = Stylizer(ROOT / "model-store" / "tiny.pth", device=CPU)
    code = stylizer.encode_style(ROOT / "imgs" / "style" / "great_wave.jpg")
    return lambda pixels: np.asarray(to_pil(denormalize(stylizer.paint(
        torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None], code))))


def shimmer(frames: list[np.ndarray], step: int) -> float:
    """Mean difference of each frame from the one before, moved along by `step` columns, 40 pixels from the border."""
    return np.mean([distance(one[40:-40, 40 + step : -40], other[40:-40, 40 : -40 - step])
                    for one, other in zip(frames, frames[1:])])


def test_smoothing_lowers_the_shimmer_of_a_pan(tmp_path, monkeypatch, paint):
    """And frames that are equal are painted equal."""
    wide = texture()
    frames = [wide[:128, 3 * number : 3 * number + 128] for number in range(8)]
    plain, smooth = (painted_frames(tmp_path, monkeypatch, frames, paint, share) for share in (0.0, 0.8))
    assert 1 < shimmer(plain, 3) and shimmer(smooth, 3) < 0.4 * shimmer(plain, 3)  # of tiny 8.7, and 0.16 of it
    # The grid moved along: what is blended is sharp.
    assert np.abs(np.diff(smooth[-1], axis=1)).mean() > 0.8 * np.abs(np.diff(plain[-1], axis=1)).mean()
    first, *others = painted_frames(tmp_path, monkeypatch, frames[:1] * 4, paint, 0.8)
    assert all((frame == first).all() for frame in others)


def test_shimmer_between_pixels_is_blended_away(tmp_path, monkeypatch):
    """Paint that changes from frame to frame by itself: 10 up, 10 down. Of the change, 0.2 of 20 comes through at
    first; then x' = 0.8 x + 0.2 * (+-10) swings between +-10 / 9."""
    still = texture(1)[:96, :96]
    numbers = iter(range(30))
    frames = painted_frames(tmp_path, monkeypatch, [still] * 30,
                            lambda pixels: np.full_like(pixels, 118 if next(numbers) % 2 else 138), 0.8)
    assert frames[0].mean() == 138 and frames[1].mean() == 134
    assert {frame.mean() for frame in frames[-2:]} == {127, 129}


def test_cut_leaves_no_trace_of_the_scene_before(tmp_path, monkeypatch, paint):
    before, after = texture(3), texture(4)
    scenes = [[scene[:96, 2 * number : 2 * number + 96] for number in range(4)] for scene in (before, after)]
    both = painted_frames(tmp_path, monkeypatch, [*scenes[0], *scenes[1]], paint, 0.8)
    alone = painted_frames(tmp_path, monkeypatch, scenes[1], paint, 0.8)
    assert all((one == other).all() for one, other in zip(both[4:], alone, strict=True))


def test_moving_blocks_leave_no_ghosts(tmp_path, monkeypatch):
    """Paint that reaches 16 pixels beyond the blocks: nothing of it stays where they were."""
    ground = texture(5)[:160, :192]

    def frame(number: int) -> np.ndarray:
        pixels = ground.copy()
        pixels[30:60, 10 + 7 * number : 40 + 7 * number] = (250, 20, 20)
        pixels[100:130, 150 - 9 * number : 180 - 9 * number] = (20, 20, 250)
        return pixels

    frames = [frame(number) for number in range(10)]
    spread = lambda pixels: cv2.dilate(pixels, np.ones((33, 33), np.uint8))  # noqa: E731
    plain, smooth = (painted_frames(tmp_path, monkeypatch, frames, spread, share) for share in (0.0, 0.8))
    for one, other in zip(plain, smooth, strict=True):
        assert np.abs(one - other).max() <= 8, np.abs(one - other).max()


def test_grid_follows_most_of_the_picture():
    wide = texture(6)
    tracker = MotionTracker(8)
    shifts = [tracker.follow(np.ascontiguousarray(wide[number : 96 + number, 3 * number : 96 + 3 * number])).shift
              for number in range(5)]
    assert shifts == [(0, 0), (1, 3), (2, 6), (3, 1), (4, 4)]
    pixels, motion = wide[:20, :30], tracker.follow(np.ascontiguousarray(wide[4:100, 12:108]))
    seen = []
    assert (paint_on_grid(pixels, motion, 8, lambda grown: seen.append(grown.shape) or grown) == pixels).all()
    assert motion.shift == (4, 4) and seen == [(28, 38, 3)]


def test_frames_too_small_for_a_flow_are_painted_one_by_one():
    tracker, blender = MotionTracker(8), Blender(0.9)
    for value in (10, 200):
        pixels = np.full((8, 40, 3), value, np.uint8)
        motion = tracker.follow(pixels)
        assert motion.source is None and (blender.blend(pixels, motion) == value).all()
