"""Keys of the artifact store: what is made parses back, and what does not parse is left alone."""

import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import InvalidInputError
from services.storage import artifact_layout as layout
from services.storage.artifact_layout import (
    CheckpointFolder,
    DatasetObject,
    Folder,
    TrainedAdapterFolder,
    UploadedAdapterFolder,
)

HEX = "0123456789abcdef"
ids = st.one_of(
    st.sampled_from(["a", "tasks", "adapters", "checkpoints", "uploaded-" + "0" * 16, "x" * 63]),
    st.text(string.ascii_lowercase, min_size=1, max_size=9),
)
tenants = ids.map("tenants/{}".format)
tasks = st.builds("{}/tasks/{}".format, tenants, ids)
adapters = st.builds("{}/adapters/{}".format, tenants, ids)
numbers = st.one_of(st.integers(0, 99), st.integers(0, 10**18 - 1))
checkpoints = st.builds(CheckpointFolder, tasks, numbers, numbers)
trained = st.builds(TrainedAdapterFolder, tasks, numbers, st.none() | numbers)
digests = st.text(HEX, min_size=16, max_size=16)
uploaded = st.builds(UploadedAdapterFolder, adapters, digests, numbers, st.text(HEX, min_size=8, max_size=8))
uploaded_before = st.builds(UploadedAdapterFolder, adapters, digests)
folders = st.one_of(checkpoints, trained, uploaded, uploaded_before)
datasets = st.builds(DatasetObject, tenants, st.text(HEX, min_size=64, max_size=64))
ODD = ["/", "..", "-", "0", "00", "A", "ä", "\n", "\0", "\u0663", "", " ", "%2F", "\\", "-step-1", "x" * 64, "1" * 5000]
PARSERS: list[Callable[[str], Any]] = [
    CheckpointFolder.parse, TrainedAdapterFolder.parse, UploadedAdapterFolder.parse, DatasetObject.parse,
]  # fmt: skip


def keys_nearby() -> st.SearchStrategy[str]:
    """Keys as they are made, and such with something put in, replaced or cut off."""
    keys = st.one_of(
        folders.map(lambda folder: folder.key),
        folders.map(lambda folder: layout.manifest_key(folder.key)),
        datasets.map(lambda dataset: dataset.key),
    )
    changed = st.builds(
        lambda key, place, odd, num_replaced: key[:place] + odd + key[place + num_replaced :],
        keys, st.integers(0, 150), st.sampled_from(ODD), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(keys, changed, changed.map(lambda key: f"x/{key}"), st.text())


@given(folders)
def test_a_folder_that_is_made_parses_back(folder: Folder) -> None:
    layout.check_key(folder.key)
    manifest = layout.manifest_key(folder.key)
    file = layout.file_key(folder.key, "adapter_model.safetensors", "ab" * 32)
    assert file == f"{folder.key}/{'ab' * 8}/adapter_model.safetensors"
    for key in (folder.key, manifest, file):
        assert key.startswith(f"{layout.ROOT}/") and layout.parse_folder(key) == folder
        assert [parsed for parse in PARSERS if (parsed := parse(key))] == [folder]
    assert layout.is_manifest(manifest) and layout.folder_of_manifest(manifest) == folder.key
    assert not layout.is_manifest(file)


@given(datasets)
def test_a_dataset_that_is_made_parses_back(dataset: DatasetObject) -> None:
    layout.check_key(dataset.key)
    assert DatasetObject.parse(dataset.key) == dataset
    assert layout.parse_folder(dataset.key) is None


@given(keys_nearby())
@example("tenants/a/tasks/t/checkpoints/00000001-1\n")
@example("tenants/a/tasks/t/checkpoints/1-1")
@example("tenants/a/tasks/t/checkpoints/00000001-01")
@example("tenants/a/tasks/t/checkpoints/\u0660\u0661-\u0661")
@example("tenants/../tasks/t/checkpoints/00000001-1")
@example("tenants/a/adapters/t/3-step-2")
@example("tenants/a/adapters/t/3-step-00000002-")
@example("tenants/a/adapters/t/uploaded-" + "0" * 16 + "-007-" + "0" * 8)
def test_what_parses_is_what_would_be_made(key: str) -> None:
    """So that deleting a folder that parsed never touches a key outside of it."""
    folder = layout.parse_folder(key)
    if folder is not None:
        assert key == folder.key or key.startswith(f"{folder.key}/")
        assert layout.parse_folder(folder.key) == folder
        layout.check_key(folder.key)
    dataset = DatasetObject.parse(key)
    if dataset is not None:
        assert dataset.key == key
        layout.check_key(key)


@given(tasks, st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**3))))
def test_checkpoints_of_a_task_are_ordered_by_step_then_attempt(task: str, pairs: list[tuple[int, int]]) -> None:
    ordered = sorted(CheckpointFolder(task, step, attempt) for step, attempt in pairs)
    assert [(folder.step, folder.attempt) for folder in ordered] == sorted(pairs)
    assert all(folder.key.startswith(f"{layout.checkpoints_of(task)}/") for folder in ordered)


@pytest.mark.parametrize("key", ["", "manifest.json", "tenants/a/tasks", "tenants/a/adapters/t/1/manifest.json/x"])
def test_only_a_manifest_has_a_folder(key: str) -> None:
    with pytest.raises(ValueError, match="is not the key of a manifest"):
        layout.folder_of_manifest(key)


@pytest.mark.parametrize(("tenant", "sha256"), [("tenants/..", "0" * 64), ("", "0" * 64), ("tenants/a", "../x"),
                                                ("tenants/a", "A" * 64), ("tenants/a\n", "0" * 64)])  # fmt: skip
def test_a_dataset_needs_a_tenant_and_a_hash(tenant: str, sha256: str) -> None:
    with pytest.raises(InvalidInputError, match="is not a dataset"):
        DatasetObject(tenant, sha256)


def test_the_keys_of_stores_that_exist() -> None:
    """These strings are in artifact stores already: changing one loses what is stored."""
    task, adapter = "tenants/a/tasks/t", "tenants/a/adapters/t"
    assert CheckpointFolder(task, 12, 3).key == f"{task}/checkpoints/00000012-3"
    assert CheckpointFolder(task, 123456789, 3).key == f"{task}/checkpoints/123456789-3"
    assert TrainedAdapterFolder(task, 3).key == f"{adapter}/3"
    assert TrainedAdapterFolder(task, 3, 12).key == f"{adapter}/3-step-00000012"
    assert UploadedAdapterFolder(adapter, "0" * 16, 5, "f" * 8).key == f"{adapter}/uploaded-{'0' * 16}-5-{'f' * 8}"
    assert UploadedAdapterFolder(adapter, "0" * 16).key == f"{adapter}/uploaded-{'0' * 16}"
    assert DatasetObject("tenants/a", "0" * 64).key == f"tenants/a/datasets/{'0' * 64}.jsonl"
    assert layout.manifest_key(f"{adapter}/3") == f"{adapter}/3/manifest.json"
