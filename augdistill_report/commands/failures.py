"""How a command that runs notebooks fails. Imports nothing, so that other commands need no notebook's package."""


class NotebookFailed(Exception):
    """A notebook failed. The message has its name, the cell and the error's last lines; `reason` is the error alone."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message, reason)  # both, so that it can be pickled
        self.reason = reason

    def __str__(self):
        return self.args[0]
