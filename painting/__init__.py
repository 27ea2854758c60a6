"""Painting: the stylizer with its controls, tiles, many pairs, video, and how good the pictures are.

What turns pictures into painted ones, or looks at them, lives here. `from painting import Stylizer` paints from any
program.
"""

from painting.apart import apart, at_home

if at_home():
    from painting.stylizer import Stylizer
else:  # the program has modules of its own by the names of ours
    with apart():
        from painting.stylizer import Stylizer

__all__ = ["Stylizer"]
