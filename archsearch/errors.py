"""Errors a user can meet. Each carries a cause, a remedy and the exit code of the command line."""

from __future__ import annotations


class ArchsearchError(Exception):
    """Base of all errors that archsearch raises on purpose.

    Args:
        cause: one line that says what is wrong and where.
        remedy: one line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ArchsearchError], tuple[str, str]]:
        # Errors cross process boundaries; the default would lose the remedy.
        return type(self), (self.cause, self.remedy)


class UsageError(ArchsearchError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class ConfigError(ArchsearchError):
    """A file or value that the user wrote is invalid."""

    exit_code = 3


class InvalidArchitecture(ConfigError):
    """An architecture that cannot be built or that breaks a limit of its space."""


class EnvironmentUnfit(ArchsearchError):
    """This machine, its libraries or its cluster cannot do the job."""

    exit_code = 4


class SearchStopped(ArchsearchError):
    """A breaker stopped the search; the run can be resumed."""

    exit_code = 5


class StorageError(ArchsearchError):
    """The run folder cannot be read or written."""

    exit_code = 6


class RunInUse(ArchsearchError):
    """Another process holds the lock of the run folder."""

    exit_code = 75
