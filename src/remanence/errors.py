"""Every error remanence raises on purpose.

Each says what is wrong, shows the values seen, and names what to do. Each also derives from the builtin that a user
would catch, so that `except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable


class RemanenceError(Exception):
    """Parent of all errors below."""


class SettingError(RemanenceError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class RecipeError(SettingError):
    """A recipe has an unknown key, a missing value or an import path that leads nowhere."""


class DataError(RemanenceError, ValueError):
    """Data is missing, broken, empty, or not of the shape that was promised."""


class StateMismatchError(RemanenceError, ValueError):
    """A saved state does not belong to the object that should load it."""


class ErasureNotSupported(RemanenceError, NotImplementedError):  # noqa: N818 - the protocol's own word
    """The mechanism cannot take this knowledge out again; the message names ways round."""


class NotDeterministic(RemanenceError, RuntimeError):  # noqa: N818
    """The same measurement was repeated and gave another value."""


class CellBusy(RemanenceError, RuntimeError):  # noqa: N818
    """Another process works on this cell or artifact."""


class NonFiniteLoss(RemanenceError, ArithmeticError):  # noqa: N818
    """The loss became NaN or infinite; the last good state is kept."""


class MissingExtra(RemanenceError, ImportError):  # noqa: N818
    """An optional dependency is absent; the message names the extra to install."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not among `known`.

    Returns:
        " Did you mean 'x'?" followed by the known names, ready to be appended to a message.

    Example:
        >>> nearest("lrr", ["lr", "epochs"])
        " Did you mean 'lr'? Known here: epochs, lr."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known here: {', '.join(names) or 'nothing'}."
