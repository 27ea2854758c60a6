"""Less flicker in painted videos: motion from frame to frame, and what it says of the frame painted before.

A network paints a moved picture differently: its poolings and upsamplings work on a grid of `stride` pixels, and what
is painted depends on where on that grid a thing lies. So the grid is moved along with most of the picture, and the rest
is evened out by blending each painted frame with the one before, carried along by the optical flow, wherever the
unpainted frames agree that the flow is right.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

# Mean difference in the 5 x 5 pixels around, of 255, between a frame and the one before carried along: up to the first
# the flow is right, from the second on it is wrong (something came into sight), between them partly.
_RIGHT, _WRONG = 8.0, 24.0
_REACH = 2  # squares of the grid: so far from something new, what is painted still depends on it
_LARGEST = 32.0  # of 255: what is further from the frame's own paint than this cannot be told from a ghost
_CUT = 0.4  # with less than this share of the frame followed, another scene has begun
_HYSTERESIS = 0.75  # pixels that the picture moves before the grid follows: no going to and fro between two places
_LEAST_SIDE = 32  # of a frame whose flow can be found


@dataclass(frozen=True)
class Motion:
    """How a frame came from the one before it."""

    shift: tuple[int, int]  # rows and columns that the picture's corner lies from a corner of the grid
    source: np.ndarray | None = None  # (H, W, 2), float32: column and row where each pixel was; None after a cut
    followed: np.ndarray | None = None  # (H, W, 1), float32, from 0, new, to 1, surely the same


def paint_on_grid(pixels: np.ndarray, motion: Motion, stride: int,
                  paint: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A frame, (H, W, 3), uint8, painted where `motion` has the network's grid of `stride` pixels: `paint` gets it
    continued by reflection, (H + stride, W + stride, 3). Returns the same shape."""
    (height, width), (top, left) = pixels.shape[:2], motion.shift
    grown = np.pad(pixels, ((top, stride - top), (left, stride - left), (0, 0)), mode="reflect")
    return paint(grown)[top : top + height, left : left + width]


class MotionTracker:
    """Follows the motion in unpainted frames, given in turn."""

    def __init__(self, stride: int) -> None:
        """stride: side of the grid that the network works on, pixels."""
        self._stride = stride
        cv2.setNumThreads(1)  # reading, painting and writing share the cores already
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._before = self._grey_before = None

    def follow(self, pixels: np.ndarray) -> Motion:
        """pixels: (H, W, 3), uint8, always of one size. Returns how they came from those of the call before."""
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        can_follow = self._before is not None and min(grey.shape) >= _LEAST_SIDE
        source, followed = self._compare(pixels, grey) if can_follow else (None, None)
        if source is None:  # from here on: rows and columns that the picture moved, and that the grid did, whole pixels
            self._moved, self._grid = np.zeros(2), np.zeros(2)
        self._before, self._grey_before = pixels, grey
        return Motion(tuple(int(rows_or_columns) for rows_or_columns in -self._grid % self._stride), source, followed)

    def _compare(self, pixels: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """`Motion.source` and `Motion.followed`; None and None after a cut."""
        height, width = grey.shape
        flow = self._flow.calc(grey, self._grey_before, None)  # (H, W, 2): to where each pixel was
        source = np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32) + flow
        carried = cv2.remap(self._before, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        error = cv2.blur(np.maximum.reduce(cv2.split(cv2.absdiff(carried, pixels))), (5, 5))  # (H, W)
        within = cv2.inRange(source, (0, 0), (width - 1, height - 1))
        right = (error < _WRONG) & (within > 0)
        if right.mean() < _CUT:
            return None, None
        reach = np.ones((2 * _REACH * self._stride + 1,) * 2, np.uint8)
        error = cv2.dilate(cv2.max(error, 255 - within), reach)
        followed = cv2.blur(np.clip((_WRONG - error.astype(np.float32)) / (_WRONG - _RIGHT), 0.0, 1.0), (5, 5))
        self._moved -= np.median(flow[::4, ::4][right[::4, ::4]], axis=0)[::-1]
        far = np.abs(self._moved - self._grid) > _HYSTERESIS
        self._grid = np.where(far, np.round(self._moved), self._grid)
        return source, followed[..., None]


class Blender:
    """Blends painted frames, given in turn, with those before them."""

    def __init__(self, share: float) -> None:
        """share: of the frame before, from 0 to below 1, where it could be followed."""
        self._share = share
        self._before = None  # (H, W, 3), float32: rounded ones would never come to rest

    def blend(self, painted: np.ndarray, motion: Motion) -> np.ndarray:
        """painted: (H, W, 3), uint8. Returns the same."""
        blended = painted.astype(np.float32)
        if motion.source is not None:
            carried = cv2.remap(self._before, motion.source, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
            blended += self._share * motion.followed * np.clip(carried - blended, -_LARGEST, _LARGEST)
        self._before = np.clip(blended, 0.0, 255.0)
        return np.rint(self._before).astype(np.uint8)
