"""Errors that a user can fix: one sentence that names the file or key, its value, what is allowed and the fix.

Programs print them as one line; any other exception is a bug and shows its traceback.
"""


class UserError(ValueError):
    """Wrong parameters, files, images or arguments."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that a parameter or an earlier stage promises does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])
