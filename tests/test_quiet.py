"""What other packages say is heard, but for lines of no use to anybody."""

import logging

from swiftwan.quiet import LINES, silence


def test_only_the_noise_is_dropped(caplog):
    silence()
    silence()
    for name, words in LINES.items():
        logger = logging.getLogger(name)
        logger.warning("%s and more", words)
        logger.warning("a kernel gives wrong numbers")
        assert sum(type(known).__module__ == "swiftwan.quiet" for known in logger.filters) == 1
    assert caplog.messages == ["a kernel gives wrong numbers"] * len(LINES)
