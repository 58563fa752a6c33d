"""Everything swiftwan raises on purpose.

    SwiftwanError                 exit code 1: the run failed
    ├── RequestError              exit code 2: the request cannot be met as written
    │   ├── PlanError             a technique is unknown, refused, or in conflict
    │   └── UnavailableError      this machine or installation lacks what was asked for
    ├── WeightsError              exit code 2: weights are missing, damaged, or of another model
    ├── OutputError               exit code 2: the result cannot be written there
    ├── MemoryLimitError          exit code 1: the device ran out of memory; says what would fit
    └── Cancelled                 exit code 130: the user stopped the run

Each message gives the value, the limit and the way out, on one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SwiftwanError(Exception):
    exit_code = 1


class RequestError(SwiftwanError, ValueError):
    exit_code = 2


class PlanError(RequestError):
    pass


class UnavailableError(RequestError):
    pass


class WeightsError(SwiftwanError):
    exit_code = 2


class OutputError(SwiftwanError):
    exit_code = 2


class MemoryLimitError(SwiftwanError):
    pass


class Cancelled(SwiftwanError):
    exit_code = 130


def reason(error: Exception) -> str:
    """What went wrong in a library's or the system's own words, without a number and the path that the message has."""
    return getattr(error, "strerror", None) or str(error)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or the list of all when none is close."""
    known = sorted(known)
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
