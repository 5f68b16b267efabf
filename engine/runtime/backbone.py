"""The frozen model that an executor hosts: loads it, mounts its operators and probes that packed streams are exact.

Legend: T tokens of the packed stream, H hidden, V vocabulary, M target positions.
"""

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.alignment.microbatch import Microbatch, Range
from engine.errors import BackboneUnsupportedError
from engine.kernels.packed_weight import PackedWeight
from engine.kernels.segment_cross_entropy import OutputHead
from engine.kernels.transfer import to_device
from engine.peft.layout import Layout
from engine.peft.mounted import (
    AttentionCall,
    Mounted,
    MountedAttention,
    group_linears,
    mount_attentions,
    mount_embedding,
    mount_linears,
    mount_norms,
)
from engine.peft.shared_input import SharedInput, observed_inputs, sharing
from engine.peft.sublayer import mount_sublayers, observed_sublayers
from engine.runtime import attention
from engine.runtime.activation_checkpointing import ActivationCheckpointing
from engine.runtime.staging import on_device
from engine.runtime.varlen_attention import FLASH, AttentionCache

# A TypeError of a model's code that does not take what the packed stream passes to every layer.
_NOT_TAKEN = re.compile(
    r"forward\(\)|unexpected keyword argument '(cu_seqlens|prefixes|calls|attention_cache|use_cache)'"
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
_PROBE_LENGTHS = (1, 5, 3, 8)
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Backbone:
    """Holds one model twice: `model` runs packed streams through mounted operators, `shadow` is plain transformers.

    Both share every tensor, so the shadow costs only Python objects; it serves to check exports and probes.
    `packs_weights`: where it helps, linear operators hold their weights twice more and run faster (`PackedWeight`).
    """

    def __init__(self, model: Any, *, activation_checkpointing: bool = False, packs_weights: bool = True) -> None:
        attention.register()
        model.eval().requires_grad_(False)
        self.model = model
        self._check_architecture()
        self.shadow = sharing_copy(model)
        self.model.set_attn_implementation(attention.NAME)
        self.shadow.set_attn_implementation(_plain_attention(self.shadow))
        self.layout = Layout(device=model.device)
        self.operators = mount_linears(self.model, self.layout)
        norms = mount_norms(self.model, self.layout)
        self.attentions: dict[str, MountedAttention] = {}
        self.attention_paths = set[str]()  # see AttentionCache.paths
        softcap = getattr(model.config, "final_logit_softcapping", None)
        self.head = OutputHead(self.model.get_output_embeddings(), softcap)
        if packs_weights:
            self._pack_weights()
        self.shared_inputs: list[SharedInput] = []
        with observed_sublayers(self.model, self.operators) as widths, observed_inputs(self.operators) as groups:
            calls = self._probe()
        self.shared_inputs = group_linears(self.operators, groups)
        self.activation_checkpointing = ActivationCheckpointing(self.model, lambda: sharing(self.shared_inputs))
        if activation_checkpointing and not self.activation_checkpointing.num_layers:
            raise self._unsupported("it has no layers to checkpoint; set activation_checkpointing to false")
        self.activation_checkpointing.is_on = activation_checkpointing
        self.is_all_varlen = self.attention_paths == {FLASH}  # in all layers, unless a task has prefixes
        self.attentions = mount_attentions(self.model, self.layout, calls)
        self.mounted: dict[str, Mounted] = {
            **self.operators,
            **{name: norm for name, norm in norms.items() if norm.token_dim is not None},
            **mount_embedding(self.model, self.layout),
            **mount_sublayers(self.model, self.layout, widths),
            **self.attentions,
        }
        self.sites = tuple(mounted.op.site for mounted in self.mounted.values())

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        activation_checkpointing: bool = False,
        packs_weights: bool = True,
    ) -> "Backbone":
        """Loads a local Hugging Face folder without remote code.

        Raises BackboneUnsupportedError if it cannot be exact.
        """
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many types for a folder without a model
            raise BackboneUnsupportedError(f"{folder} does not load as a causal language model: {error}") from error
        if missing := sorted(info["missing_keys"]):  # transformers would train on random weights
            raise BackboneUnsupportedError(f"{folder} does not load: its weights lack {', '.join(missing[:3])}")
        checkpoints, packs = activation_checkpointing, packs_weights
        return cls(model.to(device), activation_checkpointing=checkpoints, packs_weights=packs)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.head.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.linear.weight.dtype

    @property
    def max_sequence_tokens(self) -> int:
        """Returns the length of the longest sequence that is exact beside any neighbour.

        Some rotary scalings change for all sequences once one of them is longer than the model's original training
        length.
        """
        config = self.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":  # "dynamic" changes beyond max_position_embeddings only
            return longest
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return min(longest, int(original or longest))

    def _pack_weights(self) -> None:
        for operator in self.operators.values():
            operator.packed = PackedWeight.of(operator.op.weight_KN)
        weight_VH = self.head.linear.weight
        self.head = replace(self.head, packed=PackedWeight.of(weight_VH.detach().T))

    def weight_bytes(self) -> int:
        """Returns the bytes of all weights as they were loaded."""
        tensors = {t.data_ptr(): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def packed_weight_bytes(self) -> int:
        """Returns the bytes of the packed copies of weights."""
        packed = (self.head.packed, *(operator.packed for operator in self.operators.values()))
        return sum(weight.nbytes for weight in packed if weight is not None)

    def held_bytes(self) -> int:
        """Returns the bytes of the weights and their packed copies."""
        return self.weight_bytes() + self.packed_weight_bytes()

    def hidden(self, microbatch: Microbatch, resident: frozenset[str]) -> torch.Tensor:
        """Returns the last hidden states [T, H] of the packed stream.

        Resident tasks' adapters apply to their own spans.
        """
        self.layout.lay_out(microbatch, resident)
        lengths = [n for r in microbatch.ranges for n in _segment_lengths(r.num_tokens, r)]
        first_positions = [position for r in microbatch.ranges for position in self._first_positions(r)]
        token_ids_1T = on_device(microbatch, self.device)[0].long().unsqueeze(0)
        return self._packed_hidden(token_ids_1T, lengths, first_positions)

    def _first_positions(self, range_: Range) -> list[int]:
        """Returns the first position of each segment and of the tail: after the task's prefix, if it has one."""
        attention = next(iter(self.attentions.values()), None)
        adapter = attention.adapters.get(range_.task) if attention else None
        first = adapter.method.num_prefix_tokens if adapter else 0
        return [first] * len(_segment_lengths(range_.num_tokens, range_))

    def _packed_hidden(
        self,
        token_ids_1T: torch.Tensor,
        lengths: list[int],
        first_positions: list[int],
        calls: list[AttentionCall] | None = None,
    ) -> torch.Tensor:
        positions = [torch.arange(first, first + n) for first, n in zip(first_positions, lengths, strict=True)]
        position_ids_1T = to_device(torch.cat(positions), self.device).unsqueeze(0)
        cu_seqlens = [0, *itertools.accumulate(lengths)]
        return self.packed_hidden(token_ids_1T, position_ids_1T, cu_seqlens, AttentionCache(), calls)

    def packed_hidden(
        self,
        token_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        cu_seqlens: list[int],
        cache: AttentionCache,
        calls: list[AttentionCall] | None = None,
    ) -> torch.Tensor:
        """Returns the last hidden states [T, H] under the current layout.

        `cu_seqlens` may be empty if `cache` has the bounds on the device and the backbone `is_all_varlen`.
        """
        prefixes = {id(mounted.op.module): mounted.prefixes() for mounted in self.attentions.values()}
        self.layout.num_tokens = token_ids_1T.shape[1]
        base = self.model.base_model
        with sharing(self.shared_inputs):
            output = base(
                input_ids=token_ids_1T,
                position_ids=position_ids_1T,
                cu_seqlens=cu_seqlens,
                prefixes=prefixes,
                calls=calls,
                attention_cache=cache,
                use_cache=False,
            )
        self.attention_paths |= cache.paths
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0]

    def _check_architecture(self) -> None:
        """Refuses what the probe cannot see. Raises BackboneUnsupportedError.

        These are layers that differ only on long sequences, and operators that do not multiply by their weight.
        """
        kinds = set(getattr(self.config.get_text_config(), "layer_types", None) or ())
        if unknown := kinds - _LAYER_TYPES:
            raise self._unsupported(f"it has layers of type {', '.join(sorted(unknown))}")
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
                raise self._unsupported(f"{name} is a {type(module).__name__}, not a plain linear operator")
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.ndim > 1 and tensor.dtype in _PACKED:  # else no target module could name it
                    raise self._unsupported(f"{name}.{key} holds quantised weights ({tensor.dtype})")

    @torch.no_grad()
    def _probe(self) -> list[AttentionCall]:
        """Checks that a packed stream of random sequences gives the logits of the sequences run one by one.

        Returns the calls of the attention, one per layer. Raises BackboneUnsupportedError.
        """
        if self.config.get_text_config()._attn_implementation != attention.NAME:
            raise self._unsupported("its attention does not go through transformers' AttentionInterface")
        generator = torch.Generator().manual_seed(0)
        vocab = self.config.get_text_config().vocab_size
        sequences = [torch.randint(0, vocab, (n,), generator=generator).to(self.device) for n in self._probe_lengths()]
        try:
            lengths, calls = [len(s) for s in sequences], list[AttentionCall]()
            hidden_TH = self._packed_hidden(torch.cat(sequences).unsqueeze(0), lengths, [0] * len(lengths), calls)
        except TypeError as error:
            if not _NOT_TAKEN.search(str(error)):  # a fault of our own code, or of a library that it calls
                raise
            raise self._unsupported(f"its forward does not accept the packed stream ({error})") from error
        packed_TV = self.head.logits(hidden_TH)
        separate_TV = torch.cat([self.shadow(input_ids=s.unsqueeze(0), use_cache=False).logits[0] for s in sequences])
        difference = (packed_TV - separate_TV).abs().max().item()
        tolerance = _PROBE_TOLERANCE[self.dtype] * separate_TV.abs().max().item()
        if not difference <= tolerance:
            raise self._unsupported(f"packed and separate logits differ by {difference:.2g} (at most {tolerance:.2g})")
        return calls

    def _probe_lengths(self) -> tuple[int, ...]:
        window = getattr(self.config.get_text_config(), "sliding_window", None)
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", 8) or 8
        return (*(min(n, longest) for n in _PROBE_LENGTHS), *((window + 3,) if window and window < 512 else ()))

    def _unsupported(self, reason: str) -> BackboneUnsupportedError:
        kind = type(self.model).__name__
        return BackboneUnsupportedError(
            f"{kind} cannot be trained exactly on a packed stream: {reason}", architecture=kind
        )


def sharing_copy(model: Any) -> Any:
    """Returns a copy of the model with its own modules and the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def _segment_lengths(num_tokens: int, range_: Any) -> list[int]:
    lengths = [segment.num_tokens for segment in range_.segments]
    tail = num_tokens - sum(lengths)
    return [*lengths, tail] if tail else lengths


def _plain_attention(model: Any) -> str:
    """Returns the name of the model's own attention: eager if SDPA omits a part of it."""
    softcaps = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if softcaps or not model._supports_sdpa else "sdpa"
