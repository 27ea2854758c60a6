"""Painting: the stylizer with its controls, tiles, many pairs, video, and how good the pictures are.

What turns pictures into painted ones, or looks at them, lives here. `from painting import Stylizer` paints from any
program.
"""

from painting.stylizer import Stylizer

__all__ = ["Stylizer"]
