"""The one family of errors that COTS raises at its users.

Every message is one sentence that says what was wrong, with the value, and what to do. The command line prints it and
exits with 1; a traceback means a defect in COTS.
"""


class CotsError(Exception):
    """Base class: something that the user can mend."""


class ConfigError(CotsError):
    """A configuration that cannot be read or does not validate."""


class MediaError(CotsError):
    """An image or a video that cannot be read.

    Attributes:
        path: what was read, as the user named it.
        reason: why it could not be read.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # what it is made anew from when it comes out of another process
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SourceError(CotsError):
    """A source of samples that does not exist, holds no media or lacks a column."""


class ModelError(CotsError):
    """An unknown model, or a model directory that is damaged or of another architecture."""


class GalleryError(CotsError):
    """A gallery that is missing, damaged, built by another model, or asked for something it cannot do."""


class TrainingError(CotsError):
    """A training run that cannot go on."""


class EvaluationError(CotsError):
    """An evaluation whose inputs are incomplete or contradictory."""


class MissingDependency(CotsError):
    """An optional package that a command needs and that is not installed."""

    def __init__(self, package: str, install: str) -> None:
        super().__init__(package, install)  # for the same reason as a MediaError

    def __str__(self) -> str:
        package, install = self.args
        return f"{package} is not installed; install it with: {install}"
