"""What an executor says of itself: its backbone, its device, its memory."""

import os
import platform
from pathlib import Path

import torch

from engine.runtime.backbone import Backbone
from muxtune.v1 import plan_pb2

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def describe_backbone(name: str, backbone: Backbone) -> plan_pb2.Backbone:
    text = backbone.config.get_text_config()
    operators = [mounted.op for mounted in backbone.operators.values()]
    return plan_pb2.Backbone(
        name=name,
        architecture=type(backbone.model).__name__,
        num_parameters=sum(p.numel() for p in backbone.model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_sequence_tokens=getattr(text, "max_position_embeddings", 0) or 0,
        weight_bytes=backbone.weight_bytes(),
        dtype=str(backbone.dtype).removeprefix("torch."),
        adaptable_modules=[
            plan_pb2.AdaptableModule(name=op.name, in_features=op.in_features, out_features=op.out_features)
            for op in operators
        ],
    )


def describe_device(device: torch.device, memory_bytes: int, tokens_per_second: float) -> plan_pb2.Device:
    """`memory_bytes` 0: all there is. Memory in use is the process's own."""
    if device.type == "cuda":
        there, model = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
        used = torch.cuda.memory_reserved(device)
    else:
        there, model, used = _host_memory_bytes(), _cpu_model(), _resident_bytes()
    return plan_pb2.Device(
        kind=device.type,
        model=model,
        memory_bytes=min(memory_bytes or there, there),
        used_bytes=used,
        effective_tokens_per_second=tokens_per_second,
    )


def _host_memory_bytes() -> int:
    """What the machine has, or less where the cgroup allows less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(there, int(limit)) if limit.isdigit() else there


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
