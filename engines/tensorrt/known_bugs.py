"""What is known to be wrong with plans of some versions of TensorRT."""

from __future__ import annotations

from tocom_export.errors import PlanError

from .library import Nvidia
from .plan import Refit


def check_refit(nvidia: Nvidia, refit: Refit) -> None:
    """Raise PlanError where a version is known to build plans that can be refitted wrongly.

    NVIDIA's documentation of 11.3 warns of ``REFIT``, alone and not of ``REFIT_INDIVIDUAL``, by
    which we ask for the same of fewer weights; that of 11.4 no longer does.
    """
    if nvidia.library == "tensorrt" and nvidia.release == (11, 3) and refit in ("qkv", "all"):
        raise PlanError(
            f"`refit` {refit}: TensorRT 11.3 may lose the bias of a product in a plan that can be "
            "refitted, and nothing tells; install 11.4, or choose `refit` identical or none."
        )


def explain_doubt(nvidia: Nvidia) -> str | None:
    """Why a plan should be compared with its model; None where nothing is known against it."""
    if nvidia.library == "tensorrt" and nvidia.release in ((10, 3), (10, 4)):
        return (
            f"TensorRT {nvidia.version}: wrong ViTs were reported of 10.3 and 10.4, where the "
            "library chose the types. Here graphs do; still, compare the plans with the model "
            "where they will run: tocom-export verify."
        )
    return None
