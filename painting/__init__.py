"""What turns pictures into painted ones, or looks at them. `from painting import Stylizer` paints from any program."""

from contextlib import nullcontext

from painting.apart import apart, at_home

with nullcontext() if at_home() else apart():  # else the program has modules of its own by the names of ours
    from painting.stylizer import Stylizer

__all__ = ["Stylizer"]
