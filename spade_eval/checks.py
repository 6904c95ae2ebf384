"""The checks that decide, at load, whether a model can be decoded from its middle.

Nothing here knows a model's name. Each check compares what `Backbone` computes with what the model
itself computes, on three tokens:

1. layers: running layer by layer gives `model(...)`;
2. tail: from every layer l, one token with the stored start goes on to `model([start, token])`;
3. start: the start token's states are the same alone and followed by others;
4. pack: one row with branches behind a shared context gives what two rows give.

Where 2 fails, keys and values are not all that the start token leaves behind, and both tokens of a
pair are computed from then on. A model that still fails it, or 1 or 3, is refused; failing 4 only
rules out packed rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from spade_eval.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spade_eval.backbone import Backbone

log = logging.getLogger(__name__)

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BRANCHES = 16  # of a packed row: what depends on columns instead of positions is then far off


def probe_ids(backbone: Backbone) -> Tensor:
    """Three distinct token ids, (1, 3)."""
    n = backbone.model.config.get_text_config().vocab_size
    return torch.tensor([[n // 2, n // 3, n // 5]], device=backbone.device)


@torch.no_grad()
def measure(backbone: Backbone) -> tuple[int, int, int, torch.dtype]:
    """Run the model once as it is.

    Returns:
        Width d, vocabulary size V of the logits, the number of values that a layer returns in a
        tuple (0 if it returns a bare tensor), and the dtype of its states.

    Raises:
        UnsupportedModelError: Its layers return something else.
    """
    seen: list[Any] = []
    handle = backbone._layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    try:
        logits = backbone.model(input_ids=probe_ids(backbone), use_cache=False).logits
    finally:
        handle.remove()
    out = seen[0] if seen else None
    states = out[0] if isinstance(out, tuple) else out
    if not isinstance(states, Tensor):
        raise UnsupportedModelError(
            f"{backbone.name}: its layers return {type(states).__name__}, not states."
        )
    size = len(out) if isinstance(out, tuple) else 0
    return states.shape[-1], logits.shape[-1], size, states.dtype


def _products() -> FlopCounterMode:
    """Counts the operations of matrix products, those of experts among them.

    Attention kernels are left out: some are known to the counter and some are not, and older
    versions of it refuse those of a GPU where heads share keys.
    """

    def none(*_: Any, **__: Any) -> int:
        return 0

    def grouped(states: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * states[0] * weights[-2] * weights[-1]  # (N, K) with (experts, K, M)

    counts = {op: none for op in flop_registry if "attention" in str(op)}
    kernels = (torch.ops.aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback")
    for library, name in kernels:
        if hasattr(library, name):
            counts[getattr(library, name)] = grouped
    return FlopCounterMode(display=False, custom_mapping=counts)


@torch.no_grad()
def operations(backbone: Backbone) -> float:
    """Operations of a layer's matrix products per token, their mean over the layers.

    Of experts, those that run are counted. Attention that is computed by matrix products grows with
    the square of the tokens T, and some adapters multiply their own weights at each call: of
    f(T) = a T + b T^2 + c, a is wanted.
    """
    kinds = [tuple(p.shape for p in layer.parameters()) for layer in backbone._layers]
    alike = Counter(kinds)  # counting one of each is enough
    return sum(_priced(backbone, kinds.index(kind)) * n for kind, n in alike.items()) / len(kinds)


def _priced(backbone: Backbone, layer: int) -> float:
    """`operations` of the layer above `layer`."""
    found, ordinary = _operations(backbone, layer), 24.0 * backbone.width**2  # 12 d^2 weights
    # Kernels of quantised weights are unknown to the counter, but not the adapter beside them.
    return max(found, ordinary) if _quantised(backbone._layers[layer]) else found or ordinary


def _quantised(layer: torch.nn.Module) -> bool:
    """Whether some weights of a layer are packed into integers."""
    tensors = (*layer.parameters(), *layer.buffers())
    return any(t.dim() > 1 and t.dtype in _PACKED for t in tensors)


def _operations(backbone: Backbone, layer: int) -> float:
    """`a` of the layer above `layer`, by torch's counter; 0 if that knows none of its kernels."""
    ids = probe_ids(backbone)
    counts = []
    for times in (1, 2, 3):
        lane = backbone.embed(ids.repeat(1, times))
        lane.depth = layer  # whatever the states: operations do not depend on them
        with _products() as counter:
            backbone.advance(lane, layer + 1)
        counts.append(counter.get_total_flops())
    second, third = counts[1] - counts[0], counts[2] - counts[1]  # a T + 3 b T^2, a T + 5 b T^2
    return (5 * second - 3 * third) / (2 * ids.shape[1])


def head_operations(backbone: Backbone) -> float:
    """Operations of the head at one position."""
    states = torch.zeros(1, backbone.width, dtype=backbone.state_dtype, device=backbone.device)
    with torch.no_grad(), _products() as counter:
        backbone.logits(states)
    return counter.get_total_flops() or 2.0 * backbone.width * backbone.vocab_size


@torch.no_grad()
def run(backbone: Backbone) -> tuple[bool, bool]:
    """Run the four checks; `keeps_keys` of the backbone is set.

    Returns:
        Whether positions are inert in a tail, and whether rows may be packed.

    Raises:
        UnsupportedModelError: Check 1, 2 or 3 failed; names the model's class and the check.
    """
    for number, (check, meaning) in enumerate(
        [
            (_layers, "layers: layer by layer must equal the model's own forward"),
            (
                _tail,
                "tail: a token continued from the middle must equal the model on [start, token]",
            ),
            (_start, "start: the first token's states must not depend on what follows"),
        ],
        start=1,
    ):
        failed = failure(check, backbone)
        if failed and check is _tail:
            log.info("%s: start tokens are computed in each tail (%s)", backbone.name, failed[0])
            backbone.keeps_keys = False
            backbone.starts.clear()
            failed = failure(check, backbone)
        if failed:
            found, cause = failed
            raise UnsupportedModelError(
                f"{backbone.name} fails check {number} ({meaning}): {found}. Supported are "
                "decoder-only models whose layers are causal and run one after another."
            ) from cause
    # A recurrent state runs on from branch to branch, whatever the mask says.
    return _positions_inert(backbone), backbone.keeps_keys and _packs(backbone)


def failure(
    check: Callable[[Backbone], tuple[Tensor, Tensor]], backbone: Backbone
) -> tuple[str, Exception | None] | None:
    """What is wrong if the two tensors of a check differ, or it fails in itself; None if nothing.

    Returns:
        What was found, and the error behind it.
    """
    try:
        ours, theirs = check(backbone)
        error, bound = distance(ours, theirs), tolerance(theirs)
    except Exception as err:
        return f"{type(err).__name__}: {err}", err
    if error <= bound:
        return None
    return f"relative difference {error:.2g}, allowed {bound:.2g}", None


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest ||ours - theirs|| / ||theirs|| over the rows of two (N, width) tensors."""
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)).max())


def tolerance(x: Tensor) -> float:
    """Half of the digits that the dtype has: 3e-4 in fp32, 0.09 in bf16."""
    return float(torch.finfo(x.dtype).eps ** 0.5)


def _layers(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)
    lane = backbone.advance(backbone.embed(ids), backbone.n_layers)
    return backbone.logits(lane.h[0]), backbone.model(input_ids=ids, use_cache=False).logits[0]


def _tail(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)[:, :2]
    h = torch.cat([h[0, 1:].to(ids.device) for h in backbone.hidden_states(ids)])  # (L + 1, d)
    start, token = ids.expand(len(h), -1).unbind(1)
    tails = backbone.tail(h, torch.arange(len(h)), token, torch.ones_like(token), start)
    theirs = backbone.model(input_ids=ids, use_cache=False).logits[0, 1]
    return backbone.logits(tails), theirs.expand(len(tails), -1)


def _start(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)
    alone = backbone.start_states(ids[:, 0]).states[0]  # (L + 1, d)
    followed = [h[0, 0].to(alone.device) for h in backbone.hidden_states(ids)]
    return alone, torch.stack(followed)


def _positions_inert(backbone: Backbone) -> bool:
    """Whether a tail gives the same states wherever the answer token is said to stand."""
    ids = probe_ids(backbone)
    h = backbone.embed(ids).h[0, 2:].to(ids.device)
    one = torch.ones(1, dtype=torch.long, device=ids.device)
    near = backbone.tail(h, 0, ids[:, 2], one, ids[:, 0])
    far = backbone.tail(h, 0, ids[:, 2], one + 1, ids[:, 0])
    return torch.equal(near, far)


def _packs(backbone: Backbone) -> bool:
    """Whether [a, b | b, c | ... | c, b], branches on one context, gives what two rows give."""
    if not backbone._takes_positions:
        return False  # it counts columns, which in half precision a small model may hardly show
    a, b, c = probe_ids(backbone)[0].tolist()
    rows = torch.tensor([[a, b, b, c], [a, b, c, b]], device=backbone.device)
    packed = torch.tensor([[a, b, *[b, c] * _BRANCHES, c, b]], device=backbone.device)
    positions = torch.tensor([[0, 1, *[2, 3] * (_BRANCHES + 1)]], device=backbone.device)
    width = packed.shape[1]
    branches = torch.arange(4, width + 1, 2).repeat_interleave(2)
    ends = torch.cat([torch.tensor([width, width]), branches])[None].to(backbone.device)
    try:
        theirs = backbone.hidden_states(rows)[-1][:, 2:].flatten(0, 1)  # (4, d)
        lane = backbone.embed(packed, positions, backbone.additive_mask(ends))
        ours = backbone.advance(lane, backbone.n_layers).h[0, [2, 3, -2, -1]]
        return distance(ours, theirs) <= tolerance(theirs)
    except Exception as err:  # a model may refuse a 4D mask in any way it likes
        log.info("%s: rows cannot be packed (%s: %s)", backbone.name, type(err).__name__, err)
        return False
