"""Operators that read the same tensor are found, and computing them together changes no result."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import nn

from engine.alignment.microbatch import MicrobatchKind
from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import Operator
from engine.methods import Bottleneck, Ia3, Lora, LoraBias, Selective, Vera
from engine.methods.base import Method
from engine.peft import shared_input
from engine.peft.layout import Layout, TaskSpan
from engine.peft.mounted import MountedLinear, group_linears
from engine.peft.registry import adapter_class
from engine.peft.shared_input import SharedInput, observed_inputs, sharing
from engine.runtime.backbone import Backbone
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of

ALL = ("all-linear",)
NAMES = ("q", "k", "v")
METHODS: dict[str, Method] = {
    "lora": Lora(3, 5.0, ALL, 0.4, bias=LoraBias.ALL),
    "q and v": Lora(2, 5.0, ("q", "v")),
    "vera": Vera(4, ALL),
    "dora": Lora(2, 3.0, ("k",), use_dora=True),
    "outputs": Ia3(ALL),
    "serial": Bottleneck(2, ("v",)),
}


class ThreeOperators:
    """The operators q, k and v on one input of 5 columns; each method's task has two tokens and one of padding."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = Layout(num_tokens=3 * len(methods) + 1, training=True)
        positions = np.arange(2, dtype=np.int64)
        self.layout.spans = tuple(TaskSpan(n, 1, 3 * i, 3 * i + 2, positions) for i, n in enumerate(methods))
        self.mounted: dict[str, MountedLinear] = {}
        self.parameters: list[torch.Tensor] = []
        for index, name in enumerate(NAMES):
            base = nn.Linear(5, 3 + index, dtype=torch.float64).requires_grad_(False)
            for parameter in base.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.mounted[name] = MountedLinear(base, name, index, self.layout)
        for task, method in methods.items():
            self._attach(task, method, generator)
        self.groups = group_linears(self.mounted, [NAMES])
        self.x = torch.randn(1, self.layout.num_tokens, 5, generator=generator, dtype=torch.float64).requires_grad_()

    def _attach(self, task: str, method: Method, generator: torch.Generator) -> None:
        ops = {name: mounted.op for name, mounted in self.mounted.items()}
        shapes = method.shapes([op.site for op in ops.values()])
        tensors = {name: {k: torch.zeros(s, dtype=torch.float64) for k, s in of.items()} for name, of in shapes.items()}
        for name, adapter in adapter_class(method).build(method, [ops[n] for n in shapes], 7, tensors).items():
            for tensor in adapter.tensors.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator)).requires_grad_()
                self.parameters.append(tensor)
            self.mounted[name].adapters[task] = adapter

    def call(self, names: tuple[str, ...], x: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return each operator's output; outside of `sharing` each computes alone."""
        return [self.mounted[name](self.x if x is None else x) for name in names]


@pytest.fixture
def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of operators of each common node."""
    sizes: list[int] = []

    def count(x: torch.Tensor, operators: list[Operator]) -> tuple[torch.Tensor, ...]:
        sizes.append(len(operators))
        return multi_lora(x, operators)

    monkeypatch.setattr(shared_input, "multi_lora", count)
    return sizes


def assert_equal(three: ThreeOperators, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    leaves = [three.x, *three.parameters]
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), leaves, allow_unused=True) for ys in (actual, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="".join)
def test_computing_together_gives_the_same_in_any_order(order: tuple[str, ...], group_sizes: list[int]) -> None:
    three = ThreeOperators(METHODS)
    with sharing(three.groups):
        actual = three.call(order)
    assert group_sizes == [3]
    assert_equal(three, actual, three.call(order))


ODD_CALLS: dict[str, tuple[str, ...]] = {"one": ("k",), "twice": ("q", "q", "k", "v", "v"), "two": ("v", "q")}


@pytest.mark.parametrize("names", ODD_CALLS.values(), ids=ODD_CALLS)
def test_calls_that_the_probe_did_not_see(names: tuple[str, ...]) -> None:
    three = ThreeOperators(METHODS)
    with sharing(three.groups):
        actual = three.call(names)
    assert_equal(three, actual, three.call(names))


def another(x: torch.Tensor) -> torch.Tensor:
    return x * 1.5


def a_view(x: torch.Tensor) -> torch.Tensor:
    return x[:]


@pytest.mark.parametrize("change", [another, a_view])
def test_another_tensor_is_computed_separately(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    three = ThreeOperators(METHODS)
    with sharing(three.groups):
        actual = [*three.call(("q",)), *three.call(("k", "v"), change(three.x))]
    assert_equal(three, actual, [*three.call(("q",)), *three.call(("k", "v"), change(three.x))])


def test_a_tensor_written_to_between_calls_is_computed_again() -> None:
    three, frozen = ThreeOperators({}), torch.randn(1, 1, 5, dtype=torch.float64)
    three.x = frozen.clone()
    with sharing(three.groups):
        three.call(("q",))
        three.x.add_(1)
        actual = three.call(("k",))
    torch.testing.assert_close(actual, three.call(("k",), frozen + 1))


@pytest.mark.parametrize("first", [True, False])
def test_a_change_of_gradient_mode_between_calls(first: bool) -> None:
    three = ThreeOperators(METHODS)
    with sharing(three.groups):
        with torch.set_grad_enabled(first):
            three.call(("q",))
        with torch.set_grad_enabled(not first):
            [actual] = three.call(("k",))
    assert actual.requires_grad is not first


def test_inference_mode() -> None:
    three = ThreeOperators(METHODS)
    with torch.inference_mode(), sharing(three.groups):
        x = three.x.clone()
        actual = three.call(NAMES, x)
    torch.testing.assert_close([y.clone() for y in actual], [y.detach() for y in three.call(NAMES)])


def test_an_input_that_a_task_rewrites_is_computed_alone(group_sizes: list[int]) -> None:
    three = ThreeOperators({**METHODS, "inputs": Ia3(ALL, ("k",))})
    with sharing(three.groups):
        actual = three.call(NAMES)
    assert group_sizes == []
    assert_equal(three, actual, three.call(NAMES))


def test_operators_without_gradient_save_nothing(group_sizes: list[int]) -> None:
    three = ThreeOperators({"a": Lora(2, 4.0, ("q", "v"))})
    x = three.x.detach()
    with sharing(three.groups):
        q, k, v = three.call(NAMES, x)
    assert (q.requires_grad, k.requires_grad, v.requires_grad) == (True, False, True) and group_sizes == [2]
    torch.testing.assert_close([q, k, v], three.call(NAMES, x))


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_held_after_the_forward_pass(fails: bool) -> None:
    three = ThreeOperators(METHODS)
    x = torch.randn(1, three.layout.num_tokens, 5, dtype=torch.float64)
    held = weakref.ref(x)
    try:
        with sharing(three.groups), torch.no_grad():
            three.call(("q",), x)
            if fails:
                raise KeyError
    except KeyError:
        pass
    del x
    gc.collect()
    assert held() is None


def test_a_backward_through_one_of_them_alone() -> None:
    three = ThreeOperators(METHODS)
    with sharing(three.groups):
        actual = three.call(NAMES)
    assert_equal(three, actual[1:2], three.call(NAMES)[1:2])


# --- whole backbones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_groups_are_the_operators_that_read_the_same_tensor(architecture: str) -> None:
    """In the plain model, two operators of a group read one tensor, and no two others do."""
    model = model_of(CONFIGS[architecture])
    backbone = Backbone(copy.deepcopy(model))
    of = {id(member): n for n, group in enumerate(backbone.shared_inputs) for member in group._members}
    group_of = {name: of.get(id(operator)) for name, operator in backbone.operators.items()}
    read: dict[str, torch.Tensor] = {}
    for name in group_of:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    model(torch.arange(3, 9).unsqueeze(0))
    for a, b in itertools.combinations(group_of, 2):
        assert (read[a] is read[b]) == (group_of[a] is not None and group_of[a] == group_of[b]), (a, b)


def test_an_operator_called_twice_is_in_no_group() -> None:
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    x = torch.randn(2)
    with observed_inputs({"a": a, "b": b, "c": c}) as groups:
        a(x), b(x), c(x), a(torch.randn(2))
    assert groups == [["b", "c"]]
    a(x)  # no longer observed
    assert groups == [["b", "c"]]


@pytest.mark.parametrize("kind", list(MicrobatchKind))
@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "gemma3", "opt", "phi3", "gpt2"])
def test_a_step_equals_one_without_groups(
    architecture: str, kind: MicrobatchKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [
        task_of("a", seed=1, dropout=0.2),
        task_of("b", seed=2, rank=9, targets=["q_proj"] if architecture not in ("phi3", "gpt2") else ["all-linear"]),
        task_of("c", seed=3, method=Selective(("all-norms",))),
    ]
    model, outcomes = model_of(CONFIGS[architecture]), []
    for groups in (True, False):
        if not groups:
            monkeypatch.setattr(SharedInput, "open", lambda self: None)
        executor = executor_with(model, tasks)
        results = [r for m in pack_round(tasks, [0] * 3, kind=kind) for r in executor.run(m)]
        parameters = [executor.tasks[task.name].parameters_P.detach() for task in tasks]
        outcomes.append(([torch.tensor(r.loss) for r in results], parameters))  # type: ignore[union-attr]
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
