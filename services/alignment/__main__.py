"""The alignment service: `python -m services.alignment`, settings from MUXTUNE_* variables."""

import asyncio
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import InvalidInputError
from muxtune.v1 import alignment_pb2, alignment_pb2_grpc
from services.alignment.dataset_store import DatasetStore
from services.alignment.servicer import AlignmentServicer
from services.concurrency.byte_budget import ByteBudget
from services.rpc.authentication import mesh_authenticator
from services.rpc.server import serve
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError, from_environment
from services.storage.artifact_store import ArtifactStore
from services.storage.scratch_folder import ScratchFolder

_SEPARATOR = re.compile(r",(?=[A-Za-z0-9._-]+=)")


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings(ServerSettings):
    """Settings of the alignment service.

    `backbones`: NAME=FOLDER, separated by commas; `services.execution.prepare_backbone` writes such a folder. A path
    may contain commas: only a comma before NAME= separates. Or a JSON object of folders by name, for any paths.
    `tokenized_cache_bytes`, `tokenizing_bytes`: memory of tokenized datasets, and of those that are being tokenized.
    `scratch`: folder of temporary files, on a local disk; by default one in the system's temporary folder.
    `max_unfinished_upload_bytes`, `max_tenant_unfinished_upload_bytes`: of uploads in progress, of all tenants and of
    one.
    """

    artifact_url: str
    backbones: str
    scratch: Path | None = None
    max_dataset_bytes: int = 1 << 30
    max_unfinished_upload_bytes: int = 8 << 30
    max_tenant_unfinished_upload_bytes: int = 2 << 30
    tokenized_cache_bytes: int = 1 << 30
    tokenizing_bytes: int = 4 << 30
    tokenize_seconds: float = 3600.0

    def backbone_folders(self) -> dict[str, Path]:
        """Return the folders by name. Raises SettingsError for JSON that is not an object of strings."""
        if self.backbones.startswith("{"):
            return {name: Path(folder) for name, folder in _parse_json(self.backbones).items()}
        pairs = (entry.partition("=") for entry in _SEPARATOR.split(self.backbones) if entry)
        return {name: Path(folder) for name, _, folder in pairs}


def _parse_json(text: str) -> dict[str, str]:
    try:
        folders = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"MUXTUNE_BACKBONES: not JSON: {error}") from error
    if not all(isinstance(folder, str) for folder in folders.values()):
        raise SettingsError("MUXTUNE_BACKBONES: each value of the JSON object must be the path of a folder")
    return dict(folders)


async def main() -> None:
    settings = from_environment(AlignmentSettings, os.environ)
    store, scratch = ArtifactStore.open(settings.artifact_url), ScratchFolder.open(settings.scratch, "alignment")
    try:
        folders = settings.backbone_folders()
        datasets = DatasetStore(
            store, folders, settings.tokenized_cache_bytes, settings.tokenize_seconds, settings.tokenizing_bytes
        )
    except InvalidInputError as error:
        raise SystemExit(f"MUXTUNE_BACKBONES: {error}") from error
    budget = ByteBudget(
        "unfinished uploads", settings.max_unfinished_upload_bytes, settings.max_tenant_unfinished_upload_bytes
    )
    servicer = AlignmentServicer(datasets, settings.max_dataset_bytes, scratch, budget)

    async def stop() -> None:
        servicer.close()

    def register(server: grpc.aio.Server) -> list[str]:
        alignment_pb2_grpc.add_AlignmentServiceServicer_to_server(servicer, server)
        return [alignment_pb2.DESCRIPTOR.services_by_name["AlignmentService"].full_name]

    authenticate = mesh_authenticator(settings.mesh_secret)
    await serve("alignment", settings, register, authenticate=authenticate, on_stop=stop)


if __name__ == "__main__":
    asyncio.run(main())
