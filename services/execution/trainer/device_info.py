"""Describes the device and the backbone of this executor for scheduling."""

import os
import platform
from pathlib import Path

import torch

from engine.runtime.backbone import Backbone
from engine.runtime.footprint import BackboneFootprint
from muxtune.v1 import plan_pb2
from services.conversion.plan import site_to_module
from services.execution.settings import ExecutionSettings

_CPU_SLACK = 1.32  # malloc's fragmentation, measured by tests/services/execution/test_process_peak.py
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose_device(settings: ExecutionSettings) -> str:
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(settings: ExecutionSettings, kind: str) -> plan_pb2.Device:
    """Describes the device. Its `memory_bytes` are the setting, or else the GPU's, the container's or the machine's."""
    return plan_pb2.Device(
        kind=kind.partition(":")[0],
        model=torch.cuda.get_device_name() if kind.startswith("cuda") else _cpu_model(),
        memory_bytes=settings.memory_bytes or memory_bytes(kind),
        used_bytes=used_bytes(kind),
    )


def memory_bytes(kind: str) -> int:
    """Returns the memory of the GPU, or of this container or machine."""
    return torch.cuda.mem_get_info()[1] if kind.startswith("cuda") else _machine_bytes()


def used_bytes(kind: str) -> int:
    """Returns the bytes that all processes use of a GPU, or that this process uses of the machine."""
    if kind.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        return total - free
    return _resident_bytes()


def describe_backbone(
    settings: ExecutionSettings, backbone: Backbone, footprint: BackboneFootprint, process_bytes: int
) -> plan_pb2.Backbone:
    """Describes the backbone.

    `process_bytes`: memory of the process without the weights, after the backbone was loaded and has run.
    """
    config = backbone.config.get_text_config()
    return plan_pb2.Backbone(
        name=settings.backbone_name,
        architecture=type(backbone.model).__name__,
        num_parameters=sum({p.data_ptr(): p.numel() for p in backbone.model.parameters()}.values()),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_sequence_tokens=backbone.max_sequence_tokens,
        weight_bytes=backbone.weight_bytes(),
        packed_weight_bytes=backbone.packed_weight_bytes(),
        dtype=str(backbone.dtype).removeprefix("torch."),
        adaptable_modules=[site_to_module(site, footprint.input_groups.get(site.name, 0)) for site in backbone.sites],
        kept_token_bytes=footprint.kept_token_bytes,
        recomputed_token_bytes=footprint.recomputed_token_bytes,
        process_bytes=process_bytes,
        allocator_slack=_CPU_SLACK if backbone.device.type == "cpu" else 0.0,
    )


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or 'cpu')}, {os.cpu_count()} cores"


def _machine_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
