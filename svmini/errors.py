"""Errors that are the user's to mend: the command line prints them as one line. All others keep their traceback."""


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence: what is wrong, and what would be right."""


class MissingFile(InputError, FileNotFoundError):
    """A file or folder that was asked for is not there, and could not be fetched."""
