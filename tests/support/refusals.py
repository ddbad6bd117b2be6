"""What every refusal is: one short line, that names the thing and the mend."""

import re

LONGEST = 250  # characters, without directories: these are the user's


def one_line(error) -> str:
    """Return the message of a refusal, which has to be one short line."""
    message = str(error.value)
    assert "\n" not in message
    assert len(re.sub(r"/\S*/", "/", message)) < LONGEST, message
    return message
