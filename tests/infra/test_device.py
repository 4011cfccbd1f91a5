"""The device of a stage is what Ray has assigned to its worker."""

import os

import pytest
import torch

from infra import device
from infra.errors import InputError


def seen() -> tuple[str, str | None, int]:
    return str(device.assigned()), os.environ.get("CUDA_VISIBLE_DEVICES"), device.assigned_gpus()


def test_a_worker_without_a_gpu_works_on_the_cpu_and_sees_none(ray_session):
    import ray

    assert ray.get(ray.remote(num_cpus=0)(seen).remote()) == ("cpu", "", 0)


def test_outside_a_worker_the_device_is_the_one_that_torch_sees():
    assert device.assigned().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.assigned_gpus() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(device, "_gpus_of_worker", lambda: ["0"])
    with pytest.raises(InputError, match="was given 1 GPU, but torch .* can use none.*driver .*gpus_per_worker=0"):
        device.assigned()


def test_the_sentence_names_both_versions():
    assert "built for CUDA 13.0" in device.unusable(2, "2.13.0", "13.0", "535.104") and "535.104" in device.unusable(
        2, "2.13.0", "13.0", "535.104"
    )
    assert "built for the CPU alone" in device.unusable(1, "2.13.0+cpu", None, None)


def test_auto_takes_gpus_where_the_cluster_has_some(ray_session, monkeypatch):
    import ray

    assert device.gpus_per_worker("auto", 2) == 0 and device.gpus_per_worker(0.5, 2) == 0.5
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    assert device.gpus_per_worker("auto", 2) == 2
