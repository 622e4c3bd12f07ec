"""The one exception of our own."""


class Unsupported(NotImplementedError):
    """The chosen backend cannot do this call, though another may.

    A wrong call is a `ValueError` or a `TypeError` instead: no backend could do it.
    """
