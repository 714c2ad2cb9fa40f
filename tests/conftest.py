"""Quiet third parties; one thread, so that references have the same bits as the ranks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hpcfed.cli import quiet
from tests.support import DATASETS

quiet()
torch.set_num_threads(1)


@pytest.fixture
def datasets_folder():
    """The ten real tasks, where this checkout has them beside it."""
    if not DATASETS.is_dir():
        pytest.skip("real data: no folder ../shared/datasets beside this checkout")
    return DATASETS
