"""What other libraries would tell of their use, and don't where we import them."""

from __future__ import annotations

import os
import sys


def decline_telemetry() -> None:
    """Keep OpenVINO, NNCF and a newer ONNX Runtime from telling that they are used.

    They do so from their import on, and leave a client's number in the home folder. Call it
    before they are imported; where the user did that before, or chose, it changes nothing.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # By a package that OpenVINO and NNCF go without where it isn't there.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
