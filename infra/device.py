"""The device of a stage: what Ray has assigned to its actor, not what the machine has.

Ray 2.60 hides no GPU from an actor that asked for none, so that every such actor of a node would take the first GPU
beside the engine that was given it. Here an actor without a GPU sees none, and one with a GPU that torch cannot use is
refused, instead of working for a night on the CPU at a GPU's price.
"""

import os
from typing import TYPE_CHECKING

from infra.errors import InputError

if TYPE_CHECKING:
    import torch


def assigned() -> "torch.device":
    """The device of this process. Outside a Ray worker: the GPU where torch sees one.

    Raises:
        InputError: Ray has assigned a GPU that torch cannot use.
    """
    import torch

    ids = _gpus_of_worker()
    if ids is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not ids:
        if not torch.cuda.is_initialized():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever is loaded here later must not find one either
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(unusable(len(ids), torch.__version__, torch.version.cuda, driver()))
    return torch.device("cuda")


def assigned_gpus() -> int:
    """Number of GPUs that Ray has assigned to this worker; 0 outside a worker."""
    return len(_gpus_of_worker() or ())


def unusable(gpus: int, version: str, cuda: str | None, driver: str | None) -> str:
    """The sentence about GPUs that are there, but not for torch."""
    made_for = f"for CUDA {cuda}" if cuda else "for the CPU alone"
    has = f"is {driver}" if driver else "was not found"
    return (
        f"this worker was given {gpus} GPU{'s' if gpus > 1 else ''}, but torch {version}, which is built {made_for}, "
        f"can use none; the NVIDIA driver {has}. Install the build of torch that fits the driver, or set "
        "gpus_per_worker=0"
    )


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    try:
        with open("/sys/module/nvidia/version", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


def _gpus_of_worker() -> list[int] | list[str] | None:
    """The GPUs that Ray has assigned to this worker; None outside a worker, as on a driver."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return ray.get_gpu_ids()


def gpus_per_worker(wanted: "float | str", devices: int) -> float:
    """GPUs of one engine: the number given; for auto as many as it needs where the cluster has GPUs, else none.

    Args:
        devices: devices that one engine needs.
    """
    import ray

    if not isinstance(wanted, str):
        return wanted
    return float(devices) if ray.cluster_resources().get("GPU", 0) else 0.0
