"""What NVIDIA's driver says of this machine's GPUs. No CUDA toolkit, no torch: the driver's own
library is asked.
"""

import ctypes
from functools import cache

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@cache
def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every GPU, in CUDA's order ("9.0"); none without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    result = []
    for number in range(count.value):
        digits = []
        for attribute in (MAJOR, MINOR):
            if driver.cuDeviceGet(ctypes.byref(device), number):
                return tuple(result)
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            digits.append(str(value.value))
        result.append(".".join(digits))
    return tuple(result)
