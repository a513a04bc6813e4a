"""Inside the rig: torch_npu on the stand-in device. Elsewhere: only `releases` is collected.

`test_rig.py` is collected everywhere and skips itself, so that a run says what it left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.npu.device import DEVICE, inside_rig

collect_ignore: list[str] = []

if inside_rig():
    import torch_npu  # noqa: F401 -- registers the device

    from tests.npu import host_ops

    DEVICE.connect()
    KERNELS = host_ops.install()
    # Past releases are played by their schemas, without torch_npu: the ordinary tests do that.
    collect_ignore.append("releases")

    @pytest.fixture(autouse=True)
    def several_calls(no_full_masks: None) -> None:
        """At these sizes calls with a full mask are cheaper: keep those that merge in sight."""

else:
    collect_ignore += [p.name for p in Path(__file__).parent.glob("*.py") if p.stem != "test_rig"]
