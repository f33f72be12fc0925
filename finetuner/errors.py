"""Errors that a user can fix, and the exit code of each.

    FinetunerError
    ├── RecipeError       the YAML says something it cannot mean          exit 2
    ├── PlanError         the recipe does not fit this machine            exit 2
    ├── DataError         a dataset or one of its rows cannot be used     exit 2
    │   ├── RowEncodingError      a row in another encoding, as all of its file may be
    │   ├── RowFileError          a file that is laid out, packed or encoded in a way that rows are not
    │   └── LostConnectionError   a server cannot be reached any more: try later  exit 75
    ├── ModelError        a model, tokenizer or adapter cannot be used    exit 2
    ├── CheckpointError   a checkpoint or output folder cannot be used    exit 2
    ├── TrainingError     the run itself went wrong (NaN, no progress)    exit 1
    └── PreemptedError    asked to stop: saved, start me again            exit 75

Every message says what is wrong, where, shows both values and says what to type. Commands print it without a
traceback. A failure that is not one of these is a bug of ours and keeps its traceback.
"""


class FinetunerError(Exception):
    """A mistake that the user can fix; the message says how.

    `said`: another rank prints it; this one only ends with it.
    """

    exit_code = 2
    said = False


class RecipeError(FinetunerError):
    """The recipe, or an override of it, is not valid."""


class PlanError(FinetunerError):
    """The recipe is valid, but cannot run on this world (devices, ranks, launcher)."""


class DataError(FinetunerError):
    """A dataset is missing, empty, or holds a row that cannot become tokens."""


class RowEncodingError(DataError):
    """A row is not UTF-8, and reads as a text in another encoding: the file is to be rewritten, not the row skipped."""


class RowFileError(DataError):
    """A file of rows is laid out, packed or encoded in a way that rows are not.

    Raised even where bad rows are skipped: the rows that would be lost are not even counted.
    """


class LostConnectionError(DataError):
    """Rows that are read over a network cannot be reached any more. The same command may succeed later."""

    exit_code = 75


class ModelError(FinetunerError):
    """A model, tokenizer or adapter is missing, of the wrong kind, or does not fit the other parts."""


class CheckpointError(FinetunerError):
    """A checkpoint is damaged or of another run, or the output folder cannot be used."""


class TrainingError(FinetunerError):
    """Training cannot go on; what was saved before stays valid."""

    exit_code = 1


class PreemptedError(FinetunerError):
    """A signal asked the run to stop. 75 is sysexits.h's EX_TEMPFAIL: the same command may succeed later."""

    exit_code = 75
