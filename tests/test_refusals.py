"""Bad input: one clear line on stderr and exit code 2. Every refusal of the command line that needs no more than flags
and a few files is a row here: what is given, and the words that the line must have.

`{tmp}` in a value is a folder of the test's own, made by FILES.
"""

import pytest
from helpers import refusal

# A row: mode, flags ("--imsize 0 --save_path {tmp}/out"), words that the line must have.
COMMAND_LINE = (
)

TRAINING = (
)

PAINTING = (
)

PICTURES_AND_FILES = (
)

PRUNING = (
)

EXPORTING = (
)

ROWS = COMMAND_LINE + TRAINING + PAINTING + PICTURES_AND_FILES + PRUNING + EXPORTING


@pytest.mark.parametrize("mode, flags, words", ROWS)
def test_bad_input_is_one_line(mode, flags, words, capsys, tmp_path):
    line = refusal(capsys, "--mode", mode, *flags.replace("{tmp}", str(tmp_path)).split())
    for word in words if isinstance(words, tuple) else (words,):
        assert word.replace("{tmp}", str(tmp_path)) in line
