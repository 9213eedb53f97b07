"""The one exception that a user is meant to see."""


class TersorError(Exception):
    """A named, expected failure: one line that says what is wrong and one that says the way out.

    The command line prints `error: <message>` and `hint: <hint>` and exits with status 1, without a traceback.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint
