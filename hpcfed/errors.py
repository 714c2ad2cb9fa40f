"""Exceptions that end a run with a sentence instead of a traceback, and how failures are told."""

import traceback


class UserError(Exception):
    """A fault in what the user gave: configuration, data, model, launch or run directory.

    The message is one sentence (two at most) that names the fault and the mend. The command line
    prints it from one rank, without a traceback, and exits with code 2.
    """


class RunError(Exception):
    """A run that cannot go on: too few clients come through. All ranks raise it alike.

    What is committed stays, and can be resumed. The command line prints the message, one sentence,
    from one rank, and exits with code 1.
    """


TOLD = 300  # characters of a failure's reason


def reason(error: BaseException) -> str:
    """An exception in one useful line: its type, its message, and where it was raised if it has
    none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or f"no message, raised {place(error)}"
    name = type(error).__name__
    whole = f"{name}: {text}"
    return whole if len(whole) <= TOLD else f"{whole[: TOLD - 4]} ..."


def place(error: BaseException) -> str:
    """Where an exception was raised: function, file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere known"
    last = frames[-1]
    return f"in {last.name} ({last.filename.rpartition('/')[2]}, line {last.lineno})"
