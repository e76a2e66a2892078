"""The one exception of this subpackage."""


class CorpusError(ValueError):
    """Bad data or a bad option: one sentence that names the file or argument, what was expected and what came."""
