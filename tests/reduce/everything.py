"""The decisions of a reduce that keeps every detection."""

from collections.abc import Sequence

import numpy as np

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.decisions import Decisions


def keep_everything(categories: Sequence[Category]) -> Decisions:
    count = len(categories)
    return Decisions(tuple(categories), np.arange(count, dtype=np.int32), np.full(count, -np.inf))
