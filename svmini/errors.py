"""Errors that the user can fix. The command line prints them in one line; all other errors keep their traceback."""


class InputError(ValueError):
    """Invalid input. The message is one sentence: what is wrong, then what to do."""


class MissingFile(InputError, FileNotFoundError):
    """A file or folder does not exist and could not be downloaded."""
