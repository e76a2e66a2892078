"""The one exception of this subpackage, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import BinaryIO, Iterator


class CorpusError(ValueError):
    """Bad data or a bad option: one sentence that names the file or argument, what was expected and what came."""


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, error: type[ValueError]) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` in one step when the block ends well, and leaves no trace when it does not.

    Raises `error` where it cannot be written.
    """
    path = os.fspath(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=os.path.dirname(os.path.abspath(path)))
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)                                  # mkstemp's files are private; this one gets the usual permissions
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as found:
        raise error(f"{path} cannot be written: {found.strerror or found}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
