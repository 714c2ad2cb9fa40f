"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A fault in what the user gave: configuration, data, model, launch or run directory.

    The message is one sentence (two at most) that names the fault and the mend. The command line
    prints it from one rank, without a traceback, and exits with code 2.
    """
