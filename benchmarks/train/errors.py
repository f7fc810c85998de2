"""What the user can mend."""


class Unusable(Exception):
    """Something given to the program cannot be used; the message is one line that says what to do about it."""
