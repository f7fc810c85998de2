"""Errors that the user can repair."""

import errno

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of what a process may have, not of the file


class Unusable(Exception):
    """Something given to the program cannot be used; the message is one line that says what to do about it."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
