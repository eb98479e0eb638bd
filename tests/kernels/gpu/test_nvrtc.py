"""NVRTC compiles here, though there is no GPU."""

from __future__ import annotations

import pytest

from qloralab.kernels.gpu import nvrtc

pytestmark = pytest.mark.skipif(bool(nvrtc.why_not()), reason=f"needs NVRTC: {nvrtc.why_not()}")


def test_a_file_is_compiled(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text('extern "C" __global__ void one(int* to) { *to = VALUE; }')
    assert nvrtc.compile_source(file, "sm_90", [b"-DVALUE=1"]).startswith(b"\x7fELF")


def test_what_does_not_compile_is_named(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text("what is this")
    with pytest.raises(nvrtc.DriverError, match=r"kernel.cu for sm_90: kernel.cu\(1\): error"):
        nvrtc.compile_source(file, "sm_90")


def test_a_status_is_an_error():
    real = nvrtc._bindings("driver")
    assert nvrtc._checked((real.CUresult.CUDA_SUCCESS, 3)) == 3
    with pytest.raises(nvrtc.DriverError, match="CUresult: CUDA_ERROR_INVALID_VALUE"):
        nvrtc._checked((real.CUresult.CUDA_ERROR_INVALID_VALUE,))
