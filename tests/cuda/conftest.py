"""Settings of the CUDA tests. Each test runs on the CPU and, if there is one, on a CUDA device."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # which deterministic algorithms need, before CUDA starts
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("math", "program")]   # helpers of other tests


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"))


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """The device, with products in full float32 precision (no TF32)."""
    assert torch.get_float32_matmul_precision() == "highest"
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield torch.device(request.param)
