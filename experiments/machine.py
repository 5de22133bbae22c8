"""What the benchmarks say of the machine they ran on, and how they make it comparable."""

import platform
from pathlib import Path

# PyTorch gets memory for every activation from malloc. glibc by default returns blocks of this size
# to the system at once, and each step then faults in all of its pages anew, which can double
# PyTorch's time. Both sides run with the same setting, so that the kernel is not what is compared.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def processor() -> str:
    """Return the name of the processor (Linux), or else its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
