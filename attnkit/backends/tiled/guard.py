"""What masked keys hold must reach nothing: a masked weight is 0, and 0 times NaN is NaN."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.scores import Job
from attnkit.backends.unseen import without_unseen

__all__ = ["guarded"]


def guarded(job: Job, key: Tensor, value: Tensor) -> tuple[Job, Tensor, Tensor]:
    """Return the job and its ``[b n s d]`` keys and values such that no tile holds wild ones.

    Keys that nobody sees are put to 0, where tiles reach them at all. Tiles with keys of another
    packed sequence give way to others, if any number there is not finite, or nearly so large
    that products with it are not.
    """
    if job.schedule.mixes and not (_is_tame(key, job.wide) and _is_tame(value, job.wide)):
        apart = schedule(job.request, wholes=job.schedule.wholes, apart=True)
        job = replace(job, schedule=apart)
    if job.schedule.strays:
        key, value = without_unseen(job.request, key, value)
    return job, key, value


def _is_tame(tensor: Tensor, wide: torch.dtype) -> bool:
    if not tensor.numel():
        return True
    largest = torch.linalg.vector_norm(tensor.detach(), torch.inf)
    return bool(largest < torch.finfo(wide).max ** 0.25)
