"""Every error a user can meet.

::

    TocomError
    ├── InputError                  bad usage or bad input: exit status 2
    │   ├── UnknownModelError       no such model name
    │   ├── UnsupportedModelError   a part of the model that a VitSpec can't express
    │   ├── DegreeError             a degree or a list of degrees out of range
    │   ├── CheckpointError         a weights file that is broken or of another model
    │   ├── BankError               a ToCom bank that is broken or of another model
    │   ├── BundleError             a bundle that is broken, changed or incomplete
    │   ├── ImageError              an image file or an image batch that can't be used
    │   ├── DataError               a set of training or test images that can't be used
    │   ├── OutputError             a place that can't be written
    │   │   └── BusyError           another is writing it
    │   ├── MissingPackageError     an optional dependency that isn't installed
    │   ├── DeviceError             a device that isn't there, or that refused something
    │   ├── PlanError               a TensorRT plan that can't be built, opened or refitted
    │   └── PoolError               a pool of engines that is closed, or isn't told enough
    ├── CheckFailed                 an engine that disagrees with the model: exit status 1
    └── Stopped                     Ctrl-C or SIGTERM came, the state is saved: exit status 130

A message is one or two lines: which file or parameter, what is wrong with it, what to do.
Parameters stand in backticks (```scale```), which the command line turns into its options.
"""

from __future__ import annotations

_BRIEF = 160
"""Characters of another library's message in one of ours."""


def brief(error: BaseException) -> str:
    """Another library's error in a few words, for a message of ours."""
    lines = str(error).splitlines()
    text = lines[0] if lines and lines[0] else type(error).__name__
    return text if len(text) <= _BRIEF else text[:_BRIEF].rsplit(" ", 1)[0] + " …"


class TocomError(Exception):
    """Base of all errors of this package; ``exit_status`` is the command line's."""

    exit_status = 1


class InputError(TocomError):
    """Bad usage or bad input."""

    exit_status = 2


class UnknownModelError(InputError):
    """No model goes by that name."""


class UnsupportedModelError(InputError):
    """The model has a part that a :class:`~tocom_export.VitSpec` can't express."""

    def __init__(self, model: str, part: str, hint: str = "") -> None:
        super().__init__(f"{model}: {part} is not supported{f'; {hint}' if hint else ''}.")
        self.part = part


class DegreeError(InputError):
    """A degree is not a whole number within the range it must lie in."""


class CheckpointError(InputError):
    """A weights file can't be read, or doesn't fit the model."""


class BankError(InputError):
    """A ToCom bank can't be read, or doesn't fit the model."""


class BundleError(InputError):
    """A bundle can't be opened, or isn't what its manifest says."""


class ImageError(InputError):
    """An image file can't be read, or a batch has the wrong shape or dtype."""


class DataError(InputError):
    """A set of labelled images is missing, broken, or doesn't fit the model."""


class OutputError(InputError):
    """A file or folder can't be written."""


class BusyError(OutputError):
    """Another process or thread is writing what was to be written."""


class MissingPackageError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; pip install 'tocom-export[{extra}]' brings it "
            f"('.[{extra}]' in a checkout)."
        )


class DeviceError(InputError):
    """A device isn't there, the runtime doesn't give it, or it refused something."""


class PlanError(InputError):
    """A TensorRT plan can't be built, opened or refitted."""


class PoolError(InputError):
    """A pool of engines is closed, or can't know what it is asked for."""


class CheckFailed(TocomError):
    """An engine's outputs differ from the model's."""


class Stopped(TocomError):
    """Ctrl-C or SIGTERM came; the state is saved, and the run goes on when it is started again."""

    exit_status = 130
