"""Resource names: what is made parses back, and nothing else parses."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidInputError
from muxtune import resource_names as client_names
from services import resource_names as names
from services.resource_names import ResourceName

LETTERS, INNER = string.ascii_lowercase, string.ascii_lowercase + string.digits + "-"
ids = st.one_of(
    st.sampled_from(["a", "tasks", "adapters", "datasets", "tenants", "checkpoints", "executors", "x" * 63]),
    st.builds(
        lambda first, inner, last: first + inner + last,
        st.sampled_from(LETTERS), st.text(INNER, max_size=61), st.sampled_from(LETTERS + string.digits),
    ),
)  # fmt: skip
tenants = ids.map("tenants/{}".format)
collections = st.sampled_from(["tasks", "datasets", "adapters"])
resources = st.builds(ResourceName, tenants, collections, ids)
near_misses = st.builds(
    lambda name, place, wrong, is_replaced: name[:place] + wrong + name[place + is_replaced :],
    resources.map(str), st.integers(0, 150), st.sampled_from(["/", "..", "A", "ä", "\n", "\u0663", "", "%2F"]),
    st.booleans(),
)  # fmt: skip


@given(resources)
def test_a_name_that_is_made_parses_back(name: ResourceName) -> None:
    assert ResourceName.parse(str(name)) == name
    assert names.tenant_of(str(name)) == name.tenant == names.check_tenant(name.tenant)
    assert names.is_task(str(name)) == (name.collection == "tasks")
    assert not names.is_tenant(str(name)) and ResourceName.parse(name.tenant) is None
    assert names.new_name(name.tenant, name.collection, name.id, "id") == str(name)
    assert ResourceName.parse(names.new_name(name.tenant, name.collection, "", "id"))


@given(st.one_of(st.text(), near_misses))
def test_what_parses_is_what_would_be_made(text: str) -> None:
    if (parsed := ResourceName.parse(text)) is not None:
        assert str(parsed) == text
        assert re.fullmatch(r"tenants/[a-z][a-z0-9-]*/(tasks|datasets|adapters)/[a-z][a-z0-9-]*", text, re.ASCII)
        assert len(text.encode()) == len(text) and all(len(part) <= 63 for part in text.split("/"))


@given(tenants, ids)
def test_a_task_and_the_adapter_that_it_leaves_share_their_id(tenant: str, resource_id: str) -> None:
    """Also where the tenant is called "tasks" or "adapters"."""
    task, adapter = f"{tenant}/tasks/{resource_id}", f"{tenant}/adapters/{resource_id}"
    assert names.adapter_of_task(task) == adapter and names.task_of_adapter(adapter) == task
    for convert, wrong in ((names.adapter_of_task, adapter), (names.task_of_adapter, task)):
        with pytest.raises(ValueError, match="is not the name"):
            convert(wrong)


@given(st.text())
def test_an_invalid_id_is_refused_in_a_name(text: str) -> None:
    if ResourceName.parse(f"tenants/a/tasks/{text}") is None and text:
        with pytest.raises(InvalidInputError):
            names.new_name("tenants/a", "tasks", text, "id")
    if not names.is_tenant(f"tenants/{text}"):
        with pytest.raises(InvalidInputError):
            names.check_tenant(f"tenants/{text}")


def test_the_tenant_of_a_hypothetical_task_needs_no_strict_id() -> None:
    assert names.tenant_of("tenants/whatif/tasks/whatif-New.v2") == "tenants/whatif"
    for text in ("", "t", "tenants/a", "tenants/a/tasks", "tasks/t", "tenants/a/plans/t", "executors/e"):
        assert names.tenant_of(text) == ""


@given(ids)
def test_a_short_name_and_the_full_one_mean_the_same(text: str) -> None:
    assert names.tenant_name(text) == names.tenant_name(f"tenants/{text}") == f"tenants/{text}"


@given(ids)
def test_an_executor_is_known_by_the_host_in_its_certificate(text: str) -> None:
    executor = names.executor_name(text)
    assert (executor, names.executor_host(executor)) == (f"executors/{text}", f"{text}.execution")
    assert names.executor_of_host(names.executor_host(executor)) == executor
    assert names.executor_of_host(text) is None


@given(resources, st.text())
def test_the_client_reads_names_as_the_mesh_does(name: ResourceName, text: str) -> None:
    for each in (str(name), name.tenant, name.id, text):
        assert client_names.tenant_of(each) == names.tenant_of(each)
        assert not each or client_names.tenant_name(each) == names.tenant_name(each)
    assert client_names.task_name(name.tenant, name.id) == str(ResourceName(name.tenant, "tasks", name.id))
    executor = client_names.executor_name(name.id)
    assert executor == client_names.executor_name(executor) == names.executor_name(name.id)
    assert client_names.executor_host(name.id) == names.executor_host(executor)
