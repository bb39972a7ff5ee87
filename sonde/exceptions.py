"""The errors sonde raises: each is a `SondeError` and the builtin a caller would expect.

Their texts quote names, which may come from a log of somebody else; so what cannot be seen in them
is shown as an escape.
"""

from .visible import TEXT_LENGTH, visible


class SondeError(Exception):
    """Base of every error that sonde raises on purpose."""

    def __str__(self) -> str:
        return visible(super().__str__(), TEXT_LENGTH)


class SondeWarning(UserWarning):
    """Something could not be recorded; the training is not affected."""

    def __str__(self) -> str:
        return visible(super().__str__(), TEXT_LENGTH)


class _LookupMessage(SondeError, KeyError):
    """A `KeyError` whose text is the message itself, without the quotes `KeyError` adds."""

    def __str__(self) -> str:
        return visible(self.args[0], TEXT_LENGTH) if self.args else ""


class InvalidInputError(SondeError, ValueError):
    """An argument cannot be used; the message says what was given and what was expected."""


class RunNotFoundError(SondeError, FileNotFoundError):
    """A path holds no run."""


class RunExistsError(SondeError, FileExistsError):
    """A run directory already holds a run that must not be mixed with a new one."""


class LayerNotFoundError(_LookupMessage):
    """A layer, or a pattern of layers, matches nothing."""


class StepNotFoundError(_LookupMessage):
    """A step was not recorded."""


class MeasureNotFoundError(_LookupMessage, AttributeError):
    """A run holds no such measure or source."""


class MismatchError(SondeError, ValueError):
    """Two things that must agree do not: example ids, decision planes, shapes."""


class UnsupportedModelError(SondeError, TypeError):
    """The model is of a kind whose layers cannot be hooked."""


class DamageError(SondeError, ValueError):
    """Bytes of a log do not match their checksum; what they held is not returned."""


class FormatError(SondeError, ValueError):
    """A log file is of a newer format, or no log file at all."""


class MissingExtraError(SondeError, ImportError):
    """A package is not installed that an integration needs; the message names the extra."""

    def __init__(self, integration: str, package: str) -> None:
        super().__init__(
            f"sonde.integrations.{integration} needs {package}; "
            f"install it by: pip install 'sonde[{integration}]'"
        )
