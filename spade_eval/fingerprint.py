"""What a lens belongs to, as short hashes: final norm and head, layers, and adapters.

A lens carries the states that the layers make into the space that the final norm and the head read.
The hashes go by the tensors, not by their names: they are the same with and without a PEFT wrapper,
and for one checkpoint loaded in several precisions. For that they have two halves, of the values
rounded to bf16 and to fp16. A checkpoint loaded in fp32 agrees with itself loaded in bf16 in the
first half, and with itself loaded in fp16 in the second.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from spade_eval.errors import UnsupportedModelError
from spade_eval.hollow import find_layers, unwrap_peft

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

VALUES = 65_536  # read of each tensor: a head of 10^8 numbers is hashed in milliseconds
LAYER_VALUES = 4_096  # of the layers, which have hundreds of tensors: a fine-tuning changes most
RUN_VALUES = 256  # of all weights, adapters too, before every run
_HALVES = (torch.bfloat16, torch.float16)


def fingerprint(model: PreTrainedModel, rows: int | None = None) -> str:
    """Hash the final norm and the head, found by structure.

    They are the output embedding, and whatever the decoder holds besides its layers and its input
    embedding: the final norm, and in some families learned positions or projections. Adapters are
    left out (`adapter_fingerprint` hashes them). Weights that accelerate has offloaded are loaded
    for it.

    Args:
        model: A causal language model, or a PEFT model around one.
        rows: How many rows of the head to read, the first ones; None reads all.

    Returns:
        "bf16hash-fp16hash", to be compared with `same`.

    Raises:
        UnsupportedModelError: The model has no output embedding, or weights without values.
    """
    name = type(unwrap_peft(model)).__name__
    head = _head(model)
    # A bias has as many rows as the weight.
    head = [t[:rows] if t.shape[:1] == head[0].shape[:1] else t for t in head]
    place = find_layers(model, name)
    skip = {id(place.layers), id(model.get_input_embeddings())}
    tensors = (*head, *_parameters(place.decoder, skip))
    if any(tensor.is_meta for tensor in tensors):
        raise UnsupportedModelError(
            f"{name}: its final norm or head is on the meta device, without values. Load the "
            "weights before using a lens."
        )
    return digest(("", tensor) for tensor in tensors)


def head_rows(model: PreTrainedModel) -> int | None:
    """The number of the head's rows, which checkpoints pad and lm-eval cuts for adapters.

    None for a head that is quantised to something else than a matrix.
    """
    return next((len(tensor) for tensor in _head(model)), None)


def layers_fingerprint(model: PreTrainedModel) -> str:
    """Hash the parameters of the decoder's layers, without adapters.

    A model that was fine-tuned in its layers alone, by a merged adapter say, differs from its base
    in nothing else.

    Args:
        model: A causal language model, or a PEFT model around one.

    Returns:
        A hash as `fingerprint`'s. Empty if the parameters are not those of the checkpoint, being
        quantised or holding an adapter that can be taken out again, or are offloaded: to load them
        all takes as long as loading the model.
    """
    base = unwrap_peft(model)
    layers = find_layers(model, type(base).__name__).layers
    quantised = getattr(base, "is_quantized", False)
    merged = any(getattr(module, "merged", False) is True for module in layers.modules())
    if quantised or merged or any(tensor.is_meta for tensor in layers.parameters()):
        return ""
    tensors = list(_parameters(layers, set()))
    if not all(tensor.is_floating_point() for tensor in tensors):
        return ""
    return digest((("", tensor) for tensor in tensors), LAYER_VALUES)


def adapter_fingerprint(model: PreTrainedModel) -> str | None:
    """Hash the weights of the active PEFT adapters; None if there are none."""
    if not getattr(model, "peft_config", None):
        return None
    from peft import get_peft_model_state_dict

    active = model.active_adapters  # a property of PEFT's models, a method of transformers'
    tensors: list[tuple[str, Tensor]] = []
    for adapter in active() if callable(active) else active:
        # Without False, PEFT may add base embeddings, and asks the Hub whether it should.
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        tensors += sorted(state.items())
    return digest(tensors)


def adapter_scaling(model: nn.Module) -> str | None:
    """Hash the factors of the active PEFT adapters, by place; None if there are no adapters.

    They come from `lora_alpha` and the like, and no weight tells them.
    """
    if not getattr(model, "peft_config", None):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    # Inside the wrapper, since transformers loads adapters without one.
    for name, module in unwrap_peft(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            active = [] if module.disable_adapters else module.active_adapters
            # Most tuners call it `scaling`, some `fourierft_scaling` and so on.
            for attribute, factors in sorted(vars(module).items()):
                if attribute.endswith("scaling") and isinstance(factors, dict):
                    some = [float(factors[adapter]) for adapter in active if adapter in factors]
                    if some:  # an inactive adapter may reach further modules
                        found.append([name, attribute, some])
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def same(a: str, b: str) -> bool:
    """Whether two hashes can be of one checkpoint: one of their halves is equal.

    A checkpoint stored in fp32 and loaded once in bf16 and once in fp16 agrees in neither.
    """
    return any(x == y for x, y in zip(a.split("-"), b.split("-"), strict=False))


def _head(model: PreTrainedModel) -> list[Tensor]:
    """The output embedding's parameters, the weight first.

    Raises:
        UnsupportedModelError: There is none.
    """
    if (head := model.get_output_embeddings()) is None:
        name = type(unwrap_peft(model)).__name__
        raise UnsupportedModelError(f"{name} has no output embedding to read a lens with.")
    return list(_parameters(head, set()))


def _parameters(module: nn.Module, skip: set[int]) -> Iterator[Tensor]:
    """The module's parameters in the order of the modules, without adapters.

    Args:
        module: Where to begin.
        skip: The `id` of modules to leave out.
    """
    if id(module) in skip:
        return
    for inner in ("original_module", "base_layer"):  # what PEFT's two kinds of wrappers wrap
        while (wrapped := getattr(module, inner, None)) is not None:
            module = wrapped
    with align_module_device(module):
        # The context drops what it has loaded; the detached tensors keep the values.
        yield from (p.detach() for p in module.parameters(recurse=False))
    for child in module.children():
        yield from _parameters(child, skip)


def digest(tensors: Iterable[tuple[str, Tensor]], values: int = VALUES) -> str:
    """Hash names, shapes and evenly spaced values of the tensors, in both halves.

    Args:
        tensors: The names and tensors.
        values: How many of each tensor.
    """
    halves = [hashlib.sha256() for _ in _HALVES]
    for name, tensor in tensors:
        some = _spread(tensor, values).cpu()
        for half, dtype in zip(halves, _HALVES, strict=True):
            half.update(f"{name}{tuple(tensor.shape)}".encode())
            half.update(some.to(dtype).view(torch.int16).numpy().tobytes())
    return "-".join(half.hexdigest()[:16] for half in halves)


def weights_digest(model: nn.Module) -> str:
    """Hash a few numbers of every weight and buffer as they are, adapters and their scaling too.

    Says whether two runs are of one model, loaded in one way; `fingerprint` and the like say
    whether two models are of one checkpoint.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not tensor.is_meta:  # not offloaded to disk
            found.update(name.encode())
            found.update(_spread(tensor, RUN_VALUES).double().cpu().numpy().tobytes())
    found.update((adapter_scaling(model) or "").encode())
    return found.hexdigest()[:16]


def config_digest(config: Any) -> str:
    """Hash a model's config, without where it was loaded from."""
    entries = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    text = json.dumps(entries, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spread(tensor: Tensor, values: int) -> Tensor:
    """At most so many values of a tensor, evenly spaced, in one dimension."""
    flat = tensor.detach().flatten()
    # An odd step shares no factor of two with the widths of models: it does not stay in one column.
    return flat[:: -(-len(flat) // values) | 1]
