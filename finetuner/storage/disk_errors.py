"""Turn an OSError on a write into a FinetunerError that says what to type."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetuner.errors import FinetunerError


@contextmanager
def explain_disk_errors(kind: type[FinetunerError], failed: str, advice: str) -> Iterator[None]:
    """Raise `kind` in place of an OSError in the block: what `failed`, the system's reason, and then the `advice`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{failed}: {error.strerror or error}.\n{advice}") from error
