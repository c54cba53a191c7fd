"""Where to compute and in which number format: a GPU that works, or why it does not; and how much memory is taken."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from peftune.errors import UserError, first_line

_OLDEST_DRIVER = {13: 580, 12: 525}  # of NVIDIA, by the CUDA that torch was built for
_OTHER_TORCH = "install a torch for CUDA 12.6, from https://download.pytorch.org/whl/cu126 (docs/install.md says how)"
_INSIST = "to compute on the CPU all the same, give device cpu (in a recipe run.device: cpu) or CUDA_VISIBLE_DEVICES="
_NO_MEMORY = "out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED"


def choose_device(asked: str = "auto") -> torch.device:
    """The device to compute on; `auto` is a GPU where there is one, of several that of this rank, else the CPU.

    A kernel is tried on a GPU before anything is loaded. There fp32 is fp32: TF32 is off, whatever a container's
    environment says. UserError where an NVIDIA driver is here and torch cannot use its GPUs, unless the CPU is asked
    for: nobody would learn why the work takes days.
    """
    gpus = count_gpus(asked)
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    if reason := why_no_kernel(device):
        raise UserError(f"{reason}; {_INSIST}")
    torch.set_float32_matmul_precision("highest")
    return device


def count_gpus(asked: str = "auto") -> int:
    """How many GPUs torch finds, of which none is touched; 0 where the CPU is asked for.

    UserError where an NVIDIA driver is here and torch cannot use its GPUs, and where a GPU is asked for and none is.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {asked}, expected auto, cpu or cuda")
    if asked == "cpu":
        return 0
    if reason := why_no_gpu():
        raise UserError(f"{reason}; {_INSIST}")
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if asked == "cuda":
        raise UserError("device is cuda, and torch finds no GPU here; expected auto or cpu")
    return 0


def why_no_gpu() -> str:
    """Why torch finds no GPU though an NVIDIA driver is here, and what to do; empty where all is as it should be.

    So it is where torch finds one, where there is no driver, and where `CUDA_VISIBLE_DEVICES` hides every GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.hip or (visible is not None and visible.strip() in ("", "-1", "NoDevFiles")):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is told here
        if torch.cuda.is_available():
            return ""
        driver = nvidia_driver()
        if driver is None:
            return ""
        found = f"an NVIDIA driver ({driver}) is here, and this torch ({torch.__version__}) "
        if torch.version.cuda is None:
            return f"{found}is one for CPUs; install the one for CUDA (docs/install.md)"
        needed = _OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
        major = driver.partition(".")[0]
        if major.isdecimal() and int(major) < needed:
            advice = f"needs {needed} or newer: update the driver, or {_OTHER_TORCH}"
            return f"{found}is for CUDA {torch.version.cuda}, which {advice}"
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            cause = "it finds no device"
        except (RuntimeError, AssertionError) as error:
            cause = first_line(error)
    seen = "" if visible is None else f"look at CUDA_VISIBLE_DEVICES, which is {visible}, and "
    return f"{found}cannot use it: {cause}; {seen}see whether nvidia-smi lists a GPU"


def why_no_kernel(device: torch.device) -> str:
    """Why a GPU that torch finds computes nothing, and what to do; empty where a product of matrices on it is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ones = torch.ones(8, 8, device=device)
            if float((ones @ ones).sum()) == 512.0:
                return ""
            cause = "a product of matrices is wrong"
        except RuntimeError as error:
            cause = first_line(error)
        name, (major, minor) = device_name(device), torch.cuda.get_device_capability(device)
    if is_no_memory(cause):
        advice = "other programs hold its memory; end them"
    elif "no kernel image" in cause:
        advice = f"this torch has none for it: {_OTHER_TORCH}"
    else:
        advice = "driver, CUDA and torch must fit; peftune doctor says more"
    what = f"{name} (compute capability {major}.{minor}) computes nothing with torch {torch.__version__}"
    return f"{what}: {cause}; {advice}"


def nvidia_driver() -> str | None:
    """Version of NVIDIA's driver, None where there is none or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        answer = subprocess.run(["nvidia-smi"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Driver Version:\s*([\d.]+)", answer.stdout.decode(errors="replace"))
    return found[1] if found else None


def device_name(device: torch.device) -> str:
    """What a device is called: `CPU`, `NVIDIA H200`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def choose_precision(asked: str, on_gpu: bool) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` takes bf16 where the hardware multiplies it, else fp16 on a GPU, else fp32."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    if asked == "auto":
        return "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    if asked == "fp16" and not on_gpu:
        raise UserError(
            "run.precision: fp16 needs a GPU (a CPU takes hundreds of times longer); use bf16, fp32 or auto"
        )
    if asked == "bf16" and on_gpu and not bf16:
        raise UserError("run.precision: this GPU has no bf16; use fp16, fp32 or auto")
    return asked


def inference_precision(asked: str, device: torch.device) -> str:
    """The same for models that do not learn: `auto` is bf16 on a GPU whose hardware multiplies it, else fp32."""
    if asked != "auto":
        return asked
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512_BF16 or AMX on x86, BF16 on Arm); emulation would be slow."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities.startswith("AVX"):
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return bool(getattr(torch.cpu, "_is_arm_bf16_supported", bool)())


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on a GPU or a CPU, in the words of CUDA and its libraries, Linux, Windows."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_no_memory(str(error))


def is_no_memory(words: str) -> bool:
    """The same of what an error says."""
    return any(each in words for each in _NO_MEMORY)


@contextmanager
def report_out_of_memory() -> Iterator[None]:
    """UserError, one line, for an allocation that fails where nothing can be made smaller: the base does not fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory before the first step or between steps; use a smaller base, data.block_size or lora.rank, "
            "or a machine with more memory; what was saved is intact"
        ) from None


def return_freed_memory() -> None:
    """Have glibc give back what was freed; it keeps holes for later use, which what comes next may not fit into."""
    with suppress(TypeError, OSError):  # Windows names no library of the process
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far by this process: allocated on its GPU, else resident in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
