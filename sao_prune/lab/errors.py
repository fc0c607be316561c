"""What the laboratory raises when the user, not the program, has to act."""

from __future__ import annotations


class LabError(Exception):
    """Something the user gave is wrong or missing; the message says what, what is allowed and what to do."""


class RecipeError(LabError, ValueError):
    """A recipe that does not say what it should; names the file, line and key."""


class DataError(LabError, ValueError):
    """A data set that is missing or damaged."""


class ResultsError(LabError, ValueError):
    """Results that are missing, or that another run is writing."""


class FollowerError(LabError):
    """What went wrong in a process other than the first of those that train together."""
