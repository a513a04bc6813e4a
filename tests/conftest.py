"""What every test shares: one torch thread per worker, and hypothesis without a stop-watch."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Workers share the cores; more threads than cores only make them wait for each other.
torch.set_num_threads(1)

# Wall time is no criterion on a shared machine, so no deadline. Under CI the examples are the
# same every time: a failure there can be repeated anywhere.
settings.register_profile(
    "attnkit",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("attnkit")
