"""What other packages say is heard, but for lines of no use to anybody."""

import logging

from swiftwan.noise import NOISE, silence


def test_only_the_noise_is_dropped(caplog):
    silence()
    silence()
    for name, words in NOISE.items():
        logger = logging.getLogger(name)
        logger.warning("%s and more", words)
        logger.warning("a kernel gives wrong numbers")
        assert sum(type(known).__module__ == "swiftwan.noise" for known in logger.filters) == 1
    assert caplog.messages == ["a kernel gives wrong numbers"] * len(NOISE)
