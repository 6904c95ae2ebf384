"""The hollow pass: have a model prepare its layers' arguments without running a layer.

The layers of a decoder sit in one `nn.ModuleList`. Probes take their place for one call and keep
what they are given; the list is put back whatever happens.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spade_eval.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerCall:
    """What the model hands to one layer besides the states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states_name: str | None  # set where a family passes the states by keyword

    def __call__(self, layer: nn.Module, h: Tensor) -> Tensor:
        """Run the real layer on the states `h`, (B, T, d) to (B, T, d)."""
        if self.states_name is None:
            out = layer(h, *self.args, **self.kwargs)
        else:
            out = layer(*self.args, **self.kwargs, **{self.states_name: h})
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Lane:
    """A batch on its way through the layers.

    Attributes:
        h: Hidden states after layer `depth`, (B, T, d).
        depth: Number of layers that `h` has passed.
        calls: For each of the L layers the arguments that the model prepared, without the states.
    """

    h: Tensor
    depth: int
    calls: list[LayerCall] = field(repr=False)


class Probe(nn.Module):
    """Stands in for one layer: keeps the arguments it is called with and computes nothing."""

    def __init__(self, layer: nn.Module, tuple_size: int):
        super().__init__()
        # In a list, since a module attribute would register the layer a second time.
        self._layer, self._tuple_size = [layer], tuple_size
        self.output: Tensor | None = None
        self.states: Tensor | None = None
        self.call: LayerCall | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments and return the states as they came, or `output`."""
        name = None if args else next(iter(kwargs))
        self.states = args[0] if name is None else kwargs.pop(name)
        self.call = LayerCall(args[1:], kwargs, name)
        h = self.states if self.output is None else self.output
        return (h,) + (None,) * (self._tuple_size - 1) if self._tuple_size else h

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for attributes (an attention type, say): the real layer answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


def probes(layers: nn.ModuleList, tuple_size: int) -> nn.ModuleList:
    """A probe for each layer, to be used again and again: making modules takes a millisecond.

    Args:
        layers: The layers.
        tuple_size: How many values a layer returns, 0 for a bare tensor.
    """
    return nn.ModuleList(Probe(layer, tuple_size) for layer in layers)


@contextmanager
def hollow(
    place: Place, stand_ins: nn.ModuleList, output: Tensor | None = None
) -> Iterator[list[Probe]]:
    """Put probes in the layers' place.

    Args:
        place: Where the layers are.
        stand_ins: The probes.
        output: What the last probe returns; its input if None.
    """
    layers = getattr(place.owner, place.attribute)
    fresh: list[Probe] = list(stand_ins)  # type: ignore[arg-type]
    fresh[-1].output = output
    setattr(place.owner, place.attribute, stand_ins)
    try:
        yield fresh
    finally:
        setattr(place.owner, place.attribute, layers)
        for probe in fresh:  # they must not keep the tensors alive
            probe.output = probe.states = probe.call = None


def head_places(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Every module that holds the head, with the attribute's name."""
    head = model.get_output_embeddings()
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner._modules.items()  # named_children() has a module once only
        if child is head
    ]


@contextmanager
def narrow_head(
    model: PreTrainedModel, places: Sequence[tuple[nn.Module, str]], tokens: Tensor
) -> Iterator[bool]:
    """Put a head of some of the vocabulary's rows in the head's place.

    Whatever the model does to logits, it then does to these.

    Args:
        model: The model.
        places: See `head_places`, which walks through all modules.
        tokens: The rows, (C,).

    Yields:
        Whether it was done: the head is a plain linear layer, not quantised, offloaded or adapted,
        and in the places where it was. Another place may use it still, so look at the width.
    """
    head = model.get_output_embeddings()
    there = [getattr(owner, name, None) is head for owner, name in places]
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook") or not (there and all(there)):
        yield False
        return
    some = tokens.to(head.weight.device)
    narrow = nn.Linear(head.in_features, len(some), bias=head.bias is not None, device="meta")
    narrow.weight = nn.Parameter(head.weight.detach()[some], requires_grad=False)
    if head.bias is not None:
        narrow.bias = nn.Parameter(head.bias.detach()[some], requires_grad=False)
    for owner, name in places:
        setattr(owner, name, narrow)
    try:
        yield True
    finally:
        for owner, name in places:
            setattr(owner, name, head)


def unwrap_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside a PEFT wrapper, for its name; the wrapper itself stays in use."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class Place:
    """Where a model has its layers.

    Attributes:
        decoder: What turns token ids into the last layer's states.
        owner: The module in it that holds the list of the layers.
        attribute: The list's name there.
        layers: The list.
    """

    decoder: nn.Module
    owner: nn.Module
    attribute: str
    layers: nn.ModuleList


def find_layers(model: PreTrainedModel, name: str) -> Place:
    """Find the decoder's list of L layers by its length.

    Raises:
        UnsupportedModelError: No list of `num_hidden_layers` modules in the decoder.
    """
    n = model.config.get_text_config().num_hidden_layers
    # Where a family's head is named "decoder", transformers takes that for the decoder.
    for decoder in (model.get_decoder(), unwrap_peft(model).base_model):
        for owner in decoder.modules():
            for attribute, child in owner.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == n:
                    return Place(decoder, owner, attribute, child)
    raise UnsupportedModelError(
        f"{name}: its decoder has no list of {n} layers (num_hidden_layers)."
    )
