"""The error that a user can mend."""


class UserError(Exception):
    """Something the user can mend. The message is one line; the command line prints it and exits with status 2."""
