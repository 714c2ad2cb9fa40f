"""The exceptions that mean "the user can mend this"."""


class UserError(Exception):
    """A fault in what the user gave: configuration, data, model, launch or run directory.

    The message is one sentence (two at most) that names the fault and the mend. The command line
    prints it from one rank, without a traceback, and exits with code 2.
    """


class DiskError(UserError):
    """A file that could not be written: a full disk, a quota, a lost right. In the middle of a run
    only the rank that writes learns of it, so that it speaks alone and ends the job."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}.")
        self.fact = fact

    def then(self, more: str) -> UserError:
        """The same, with what follows from it."""
        return UserError(f"{self.fact}, {more}.")
