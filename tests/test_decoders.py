"""Every decoder against a naive loop that does what the paper's equation says, one pair at a
time."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from zoo import SUPPORTED, random_ids, tiny

from spade_eval import decoders
from spade_eval.backbone import Backbone
from spade_eval.decoders import Decoder, LogitLens, Spade, States
from spade_eval.errors import UserError
from spade_eval.start import StartStore


def read(decoder: Decoder, backbone: Backbone, states: States) -> Tensor:
    return backbone.logits(decoder.align(backbone, states))


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def naive_tail(
    model: nn.Module,
    states: list[Tensor],
    row: int,
    at: int,
    layer: int,
    ids: Tensor,
    positions: list[int],
    pair: bool,
) -> Tensor:
    """Logits of SPADE for one token: the layers run one by one on a sequence of two (or one)
    tokens.

    Independent of Backbone: a forward pre-hook replaces what enters layer `layer`, the model does
    the rest.
    """
    keep = [0, at] if pair else [at]
    layers = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(states) - 1
    )
    fixed = states[layer][row, keep][None]  # (1, 2, d)

    def replace(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return (fixed, *args[1:]), kwargs

    handle = layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
    inputs = {
        "input_ids": ids[row, keep][None],
        "attention_mask": torch.ones(1, len(keep), dtype=torch.long),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.tensor([positions])
    try:
        return model(**inputs, use_cache=False).logits[0, -1]
    finally:
        handle.remove()


def states_at(hidden: list[Tensor], layer: int, ids: Tensor, at: list[tuple[int, int]]) -> States:
    rows, columns = (torch.tensor(x) for x in zip(*at, strict=True))
    return States(hidden[layer][rows, columns], layer, ids[rows, columns], ids[rows, 0], columns)


AT = [(0, 4), (0, 1), (1, 7), (2, 3), (1, 2)]


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("start", ["keep", "none"])
@pytest.mark.parametrize("positions", ["reset", "keep"])
@torch.no_grad()
def test_spade_agrees_with_the_naive_loop(family: str, positions: str, start: str) -> None:
    model, ids = tiny(family), random_ids(3, 8)
    backbone = Backbone(model)
    hidden = backbone.hidden_states(ids)
    decoder = Spade(positions=positions, start=start)
    pair = start == "keep"
    for layer in (0, 1, backbone.n_layers - 1):
        states = states_at(hidden, layer, ids, AT)
        ours = read(decoder, backbone, states)
        for i, (row, at) in enumerate(AT):
            last = at if positions == "keep" else int(pair)
            where = [0, last] if pair else [last]
            expected = naive_tail(model, hidden, row, at, layer, ids, where, pair)
            torch.testing.assert_close(ours[i], expected, **TOLERANCE)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_at_the_last_layer_every_decoder_is_the_model(family: str) -> None:
    model, ids = tiny(family), random_ids(3, 8)
    backbone = Backbone(model)
    logits = model(ids, use_cache=False).logits
    states = states_at(backbone.hidden_states(ids), backbone.n_layers, ids, [*AT, (2, 0)])
    for decoder in (LogitLens(), Spade(), Spade(start="none"), Spade(positions="keep")):
        for ours, (row, at) in zip(read(decoder, backbone, states), [*AT, (2, 0)], strict=True):
            torch.testing.assert_close(ours, logits[row, at], **TOLERANCE)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_spade_at_layer_0_is_the_model_on_start_and_token(family: str) -> None:
    model, ids = tiny(family), random_ids(3, 8)
    backbone = Backbone(model)
    hidden = backbone.hidden_states(ids)
    ours = read(Spade(), backbone, states_at(hidden, 0, ids, AT))
    added = family in {
        "gpt2",
        "gpt_neo",
        "opt",
        "opt_projected",
    }  # the position is in h^0 and stays there
    for logits, (row, at) in zip(ours, AT, strict=True):
        inputs = {
            "input_ids": ids[row, [0, at]][None],
            "attention_mask": torch.ones(1, 2, dtype=torch.long),
        }
        if added:
            inputs["position_ids"] = torch.tensor([[0, at]])
        torch.testing.assert_close(logits, model(**inputs).logits[0, 1], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt2"])
@torch.no_grad()
def test_position_0_answers_with_its_own_full_depth_state(family: str) -> None:
    model, ids = tiny(family), random_ids(3, 6)
    backbone = Backbone(model)
    hidden = backbone.hidden_states(ids)
    logits = model(ids, use_cache=False).logits
    states = states_at(hidden, 1, ids, [(0, 0), (1, 3), (2, 0)])
    ours = read(Spade(), backbone, states)
    torch.testing.assert_close(ours[0], logits[0, 0], **TOLERANCE)
    torch.testing.assert_close(ours[2], logits[2, 0], **TOLERANCE)
    alone = read(Spade(), backbone, states_at(hidden, 1, ids, [(1, 3)]))
    torch.testing.assert_close(ours[1], alone[0], **TOLERANCE)


@torch.no_grad()
def test_layer_start_and_positions_all_matter() -> None:
    model, ids = tiny("llama"), random_ids(3, 8)
    backbone = Backbone(model)
    hidden = backbone.hidden_states(ids)
    found = {
        (layer, decoder): read(decoder, backbone, states_at(hidden, layer, ids, AT))
        for layer in (1, 2, 3)
        for decoder in (LogitLens(), Spade(), Spade(start="none"), Spade(positions="keep"))
    }
    values = list(found.values())
    for i, a in enumerate(values):
        for b in values[:i]:
            assert (a - b).abs().max() > 0.01


@torch.no_grad()
def test_library_functions_are_the_decoders() -> None:
    model, ids = tiny("llama"), random_ids(3, 8)
    backbone = Backbone(model)
    s = states_at(backbone.hidden_states(ids), 2, ids, AT)
    args = (backbone, s.h, 2, s.token_ids)
    pairs = [
        (decoders.spade(*args, s.start_ids), Spade()),
        (decoders.spade(*args, s.start_ids, s.positions), Spade(positions="keep")),
        (decoders.spade_nos(*args), Spade(start="none")),
        (decoders.spade_nos(*args, s.positions), Spade(start="none", positions="keep")),
        (decoders.logit_lens(backbone, s.h), LogitLens()),
    ]
    for ours, decoder in pairs:
        assert torch.equal(ours, read(decoder, backbone, s))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"positions": "rest"},
            r"positions='rest' is not known; valid: reset, keep. Did you mean 'reset'",
        ),
        ({"start": "non"}, r"start='non' is not known; valid: keep, none. Did you mean 'none'"),
    ],
)
def test_unknown_settings_name_the_valid_ones(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Spade(**settings)


@torch.no_grad()
def test_start_states_are_computed_once_and_bounded() -> None:
    backbone = Backbone(tiny("llama"))
    asked: list[list[int]] = []

    def compute(ids: Tensor) -> tuple:
        asked.append(ids.tolist())
        return backbone._compute_starts(ids)

    store = StartStore(compute, capacity=3)
    fresh = backbone._compute_starts(torch.tensor([5, 6, 7]))[0]
    for ids in ([5, 6, 5], [6, 5], [7, 5], [8, 9], [7, 7]):
        found = store.get(torch.tensor(ids))
        assert len(store) <= 3
        for i, token in enumerate(ids):
            if token in (5, 6, 7):
                torch.testing.assert_close(found.hidden(2)[i], fresh[token - 5, 2])
    # 8 and 9 push out 6 and 5, used longest ago; 7 stays.
    assert asked == [[5, 6], [7], [8, 9]]


@torch.no_grad()
def test_start_states_of_another_precision_are_computed_again() -> None:
    backbone = Backbone(tiny("llama"))
    ids = random_ids(3, 8)

    def answers() -> Tensor:
        states = backbone.hidden_states(ids)[2][:, -1]
        return decoders.spade(backbone, states, 2, ids[:, -1], ids[:, 0])

    alone = answers()
    with torch.autocast("cpu", torch.bfloat16):
        rough = answers()
    assert not torch.equal(rough.float(), alone)
    assert torch.equal(answers(), alone)


@torch.no_grad()
def test_more_distinct_starts_than_the_store_holds_still_decode() -> None:
    backbone = Backbone(tiny("llama"))
    ids = torch.arange(3, 43)[:, None].repeat(1, 4)
    ids[:, 1:] = random_ids(40, 3)
    hidden = backbone.hidden_states(ids)
    at = [(row, 3) for row in range(40)]
    wide = read(Spade(), backbone, states_at(hidden, 2, ids, at))
    backbone.starts = StartStore(backbone._compute_starts, capacity=2)
    narrow = read(Spade(), backbone, states_at(hidden, 2, ids, at))
    torch.testing.assert_close(wide, narrow)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    backbone = Backbone(tiny("llama"))
    one = torch.ones(1, dtype=torch.long)
    with pytest.raises(
        UserError, match=rf"layer={layer} is out of range: LlamaForCausalLM has 0\.\.4"
    ):
        decoders.spade(backbone, torch.zeros(1, backbone.width), layer, one, one)
