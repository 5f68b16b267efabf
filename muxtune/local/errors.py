"""The error of a local mesh."""


class MeshError(Exception):
    """The mesh cannot start, or a service has ended; the message names what failed, the cause and the remedy."""
