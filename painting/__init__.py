"""What turns pictures into painted ones, or looks at them. `from painting import Stylizer` paints from any program."""

from painting.apart import apart, at_home

if at_home():
    from painting.stylizer import Stylizer
else:  # the program has modules of its own by the names of ours
    with apart():
        from painting.stylizer import Stylizer

__all__ = ["Stylizer"]
