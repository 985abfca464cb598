"""This machine's GPUs, as NVIDIA's driver reports them.

No CUDA toolkit and no torch: the driver's own library is called, also because TensorRT can end the
process where it finds no GPU.
"""

import ctypes
import sys
from functools import cache

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@cache
def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every visible GPU (`CUDA_VISIBLE_DEVICES` counts), in CUDA's order
    ("9.0"); empty without a driver or a GPU. Never raises.
    """
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return ()
    except (OSError, AttributeError):  # no such library, or one (a stub) without these functions
        return ()
    result = []
    for number in range(count.value):
        digits = []
        if driver.cuDeviceGet(ctypes.byref(device), number):
            break
        for attribute in (_MAJOR, _MINOR):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return tuple(result)
            digits.append(str(value.value))
        result.append(".".join(digits))
    return tuple(result)
