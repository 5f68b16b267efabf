"""Each method saves for backward, counted byte by byte, what `Method.saved_activation_elements` states."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.methods import (
    Activation,
    Bottleneck,
    BottleneckPlacement,
    Ia3,
    Lora,
    LoraBias,
    LoraInit,
    Miss,
    Prefix,
    Prompt,
    Selective,
    Vera,
)
from engine.methods.base import Method
from engine.runtime.executor import Executor
from tests.engine.runtime.tiny import CONFIGS, TinyTask, executor_with, model_of, pack_round, task_of
from tests.thoroughness import examples

MODEL = model_of(CONFIGS["llama-tied"])  # grouped heads, biases
ALL, CHUNK = ("all-linear",), 8
METHODS: dict[str, Method] = {
    "lora": Lora(4, 8.0, ALL),
    "lora-dropout": Lora(4, 8.0, ALL, 0.3),
    "patterns": Lora(2, 8.0, ALL, rank_pattern={"down_proj": 9}),
    "biases": Lora(3, 8.0, ("k_proj",), bias=LoraBias.ALL),
    "dora": Lora(4, 8.0, ("q_proj", "down_proj"), use_dora=True),
    "dora-dropout": Lora(4, 8.0, ("q_proj", "down_proj"), 0.3, use_dora=True),
    "pissa": Lora(3, 8.0, ("q_proj", "down_proj"), init=LoraInit.PISSA),
    "vera": Vera(16, ALL),
    "vera-dropout": Vera(16, ALL, 0.3),
    "miss": Miss(7, ALL, 0.3),
    "ia3": Ia3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "bottleneck": Bottleneck(8, ("o_proj", "down_proj")),
    "bottleneck-silu": Bottleneck(8, ("self_attn", "mlp"), activation=Activation.SILU),
    "bottleneck-parallel": Bottleneck(5, ("mlp", "gate_proj"), BottleneckPlacement.PARALLEL, Activation.TANH),
    "norms": Selective(("all-norms",)),
    "bitfit": Selective(("all-biases",)),
    "prompt": Prompt(6),
    "prefix": Prefix(6),
}
SHARED_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # one tensor each


class SavedTensors:
    """Records the storages that autograd saves, without weights and the tasks' parameters, which exist anyway."""

    def __init__(self, executor: Executor) -> None:
        model, runs = executor.backbone.model, executor.tasks.values()
        existing = [*model.parameters(), *model.buffers(), *(run.parameters_P for run in runs)]
        existing += [run.parameters_P.grad for run in runs]
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._existing:
            self._storages[storage.data_ptr()] = storage  # holding it keeps its address unique
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@contextmanager
def gradients_from_the_embedding_on(executor: Executor) -> Iterator[None]:
    """Let gradients start at the embedding, so that the bare backbone saves what it saves below an adapter."""
    embedding = executor.backbone.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, y: y if y.requires_grad else y.requires_grad_())
    yield
    hook.remove()


def saved_bytes(tasks: Sequence[TinyTask], stream: Sequence[TinyTask], from_embedding: bool = True) -> int:
    """Return the bytes that one forward over the tasks of `stream` saves, where only `tasks` are resident."""
    executor = executor_with(MODEL, tasks)
    [microbatch] = pack_round(stream, [0] * len(stream), chunk=CHUNK)
    saved = SavedTensors(executor)
    start = gradients_from_the_embedding_on(executor) if from_embedding else nullcontext()
    with start, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        executor.backbone.layout.training = True
        executor.backbone.hidden(microbatch, frozenset(executor.tasks))
    return saved.num_bytes


def task(name: str, method: Method, lengths: Sequence[int] = (9, 16, 7)) -> TinyTask:
    return task_of(name, method=method, lengths=lengths, micro_batch_size=4)


def stated_elements(tasks: Sequence[TinyTask], num_tokens: int) -> int:
    """Return what the methods state for their tokens, and the whole stream's inputs of trained A matrices, once each.

    Attention's output is not counted, because attention saves it itself, unless it runs by segment, as with a prefix.
    """
    sites = executor_with(MODEL, []).backbone.sites
    by_segment = any(each.spec.method.num_prefix_tokens for each in tasks)
    num_elements, inputs = 0, set[tuple[str, ...]]()
    for each in tasks:
        method, lengths = each.spec.method, [len(ids) for ids, _ in each.batch(0)]
        count = sum(lengths) + len(lengths) * (method.num_virtual_tokens + method.num_prefix_tokens)
        for site in (site for site in sites if site.name in method.shapes(sites)):
            num_elements += (
                method.saved_activation_elements(site, count) // site.group_size
            )  # a CPU's attention runs by key heads
            trains_a = isinstance(method, Lora) and "lora_A" in method.shapes(sites)[site.name]
            if trains_a and not (method.use_dora and method.dropout > 0):
                layer, _, last = site.name.rpartition(".")
                if last == "o_proj" and not by_segment:
                    continue
                together = next((names for names in SHARED_INPUTS if last in names), (last,))
                inputs.add((layer, str(site.in_features), *together))
    return num_elements + num_tokens * sum(int(width) for _, width, *_ in inputs)


def in_stream(tasks: Sequence[TinyTask]) -> int:
    [microbatch] = pack_round(tasks, [0] * len(tasks), chunk=CHUNK)
    return microbatch.num_tokens


def constant_elements(tasks: Sequence[TinyTask]) -> int:
    """Return the elements that do not depend on the number of tokens.

    They are frozen tensors, DoRA's norms and ratios, norms' factors, and the masks of a prefix's segments (once for all
    layers, and once for all segments of a length).
    """
    sites, total, masks = executor_with(MODEL, []).backbone.sites, 0, set[tuple[int, int]]()
    for each in tasks:
        method = each.spec.method
        started = isinstance(method, Lora) and method.starts_from_weights  # concatenated with as many trained elements
        total += method.num_frozen_elements(sites) * (2 if started else 1)
        if isinstance(method, Lora) and method.use_dora:
            shapes = method.shapes(sites)
            total += 2 * sum(site.out_features for site in sites if site.name in shapes)
        if isinstance(method, Selective):
            total += sum(s.out_features for s in sites if "weight" in method.shapes(sites).get(s.name, ()))
        if method.num_prefix_tokens:
            masks |= {(len(ids), len(ids) + method.num_prefix_tokens) for ids, _ in each.batch(0)}
    return total + sum(length * width for length, width in masks)


NEIGHBOUR = task("b", Lora(1, 1.0, ALL), (5, 11))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_saves_what_it_states(name: str) -> None:
    """Only its own tokens count: the other task of the stream is not resident."""
    single = task("a", METHODS[name])
    stream = [single, NEIGHBOUR]
    actual = saved_bytes([single], stream) - saved_bytes([], stream)
    assert actual == 4 * (stated_elements([single], in_stream(stream)) + constant_elements([single]))


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(METHODS)), min_size=2, max_size=6), st.data())
def test_a_mixture_saves_what_its_methods_state(names: list[str], data: st.DataObject) -> None:
    lengths = st.lists(st.integers(2, 24), min_size=1, max_size=4)
    tasks = [task(f"{i}-{name}", METHODS[name], data.draw(lengths)) for i, name in enumerate(names)]
    stream = [*tasks, NEIGHBOUR]
    actual = saved_bytes(tasks, stream) - saved_bytes([], stream)
    assert actual == 4 * (stated_elements(tasks, in_stream(stream)) + constant_elements(tasks))


def test_the_bare_backbone_saves_no_input_of_an_operator() -> None:
    """With gradients through all of it, it saves only what norms, attentions and activations need."""
    config, tokens = CONFIGS["llama-tied"], in_stream([NEIGHBOUR])
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    by_norm = width + 1  # its input, a row's root mean square
    key_width = width // heads * config.num_key_value_heads
    by_attention = 2 * (width + key_width) + heads  # rotated queries, keys and values, its output, normalisers
    by_activation = 3 * inner  # gate, its activation, up
    by_layer = 2 * by_norm + by_attention + by_activation
    rotation = 2 * width // heads  # cosines and sines, saved once
    assert saved_bytes([], [NEIGHBOUR]) == 4 * tokens * (config.num_hidden_layers * by_layer + by_norm + rotation)


def test_nothing_is_saved_below_the_first_adapter() -> None:
    single = task("a", Lora(3, 8.0, ("layers.1.mlp.down_proj",)))
    config, tokens = CONFIGS["llama-tied"], in_stream([single])
    last_norm = config.hidden_size + 1
    expected = tokens * (config.intermediate_size + last_norm) + 3 * sum(len(ids) for ids, _ in single.batch(0))
    assert saved_bytes([single], [single], from_embedding=False) == 4 * expected


def test_a_frozen_operator_saves_nothing() -> None:
    executor = executor_with(MODEL, [])
    saved, operator = SavedTensors(executor), executor.backbone.operators["model.layers.0.mlp.up_proj"]
    x = torch.randn(1, 8, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        y = operator(x)
    y.sum().backward()
    assert x.grad is not None and operator.weight.grad is None and saved.num_bytes == 0
