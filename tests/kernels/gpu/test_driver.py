"""NVRTC compiles here; what reaches the driver is looked at, since there is none."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from qloralab.kernels.gpu import driver

pytestmark = pytest.mark.skipif(bool(driver.why_not()), reason=f"needs NVRTC: {driver.why_not()}")


def test_a_file_is_compiled(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text('extern "C" __global__ void one(int* to) { *to = VALUE; }')
    assert driver.compile_source(file, "sm_90", [b"-DVALUE=1"]).startswith(b"\x7fELF")


def test_what_does_not_compile_is_named(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text("what is this")
    with pytest.raises(driver.DriverError, match=r"kernel.cu for sm_90: kernel.cu\(1\): error"):
        driver.compile_source(file, "sm_90")


@pytest.mark.parametrize("dependent", [False, True])
def test_a_launch(dependent, monkeypatch):
    real, given = driver._bindings("driver"), []

    def launch(config, function, parameters, extra):
        given.append((config, int(function), parameters))
        return (real.CUresult.CUDA_SUCCESS,)

    names = ("CUlaunchConfig", "CUstream", "CUfunction", "CUlaunchAttribute", "CUlaunchAttributeID")
    fake = SimpleNamespace(cuLaunchKernelEx=launch, **{name: getattr(real, name) for name in names})
    monkeypatch.setattr(driver, "_bindings", lambda name: fake)
    x = torch.zeros(3)
    driver.launch_native(7, (4, 1, 1), (512, 2, 1), 66560, 5, [x, None, -1, 3, 0.5], dependent)
    ((config, function, (values, types)),) = given
    assert (config.gridDimX, config.gridDimY, config.gridDimZ, function) == (4, 1, 1, 7)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (512, 2, 1)
    assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (66560, 5, int(dependent))
    if dependent:
        assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert values == (x.data_ptr(), 0, 0xFFFFFFFF, 3, 0.5)
    assert types == (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_float)


def test_a_status_is_an_error():
    real = driver._bindings("driver")
    assert driver._checked((real.CUresult.CUDA_SUCCESS, 3)) == 3
    with pytest.raises(driver.DriverError, match="CUresult: CUDA_ERROR_INVALID_VALUE"):
        driver._checked((real.CUresult.CUDA_ERROR_INVALID_VALUE,))
