"""The maths of `spade-eval fit`, one part at a time: ridge, loss, states, descent, each against a
naive reference."""

from __future__ import annotations

import errno
import functools
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_decoders import naive_tail
from torch import Tensor
from zoo import random_ids, tiny

from spade_eval import scoring
from spade_eval.backbone import Backbone
from spade_eval.errors import UserError
from spade_eval.fit import states
from spade_eval.fit.descent import Descent, Recipe, one_cycle
from spade_eval.fit.maps import Affine, Moments, Pairs, measure, soft_cross_entropy, whiten
from spade_eval.fit.progress import Progress
from spade_eval.lens import low_rank
from spade_eval.lm.windows import may_pack, window

if TYPE_CHECKING:
    from pathlib import Path

D, L = 32, 4  # as in the zoo


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(positions: int, d: int, seed: int = 0) -> Tensor:
    """Inputs as a model's are: correlated, off centre, of scales from 0.5 to 5."""
    scales = torch.logspace(-0.3, 0.7, d)
    mixed = random(positions, d, seed=seed) @ (torch.eye(d) + 0.3 * random(d, d, seed=seed + 1))
    return mixed * scales + 5 * random(d, seed=seed + 2)


def pairs_of(positions: int, d: int, seed: int = 0, noise: float = 0.3) -> Pairs:
    h = uneven(positions, d, seed)
    t = h + h @ (0.2 * random(d, d, seed=seed + 3)).T + 3 * random(d, seed=seed + 4)
    return Pairs(h, t + noise * random(positions, d, seed=seed + 5))


# ---------------------------------------------------------------- ridge


def ridge(pairs: Pairs, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """A and b of the penalised normal equations, solved in float64."""
    h, t = pairs.h.double().numpy(), pairs.t.double().numpy()
    x, y = h - h.mean(0), (t - h) - (t - h).mean(0)
    c = x.T @ x / len(h)
    lhs = c + np.diag(penalty * np.diag(c))
    a = np.linalg.solve(lhs, x.T @ y / len(h)).T
    return a, (t - h).mean(0) - a @ h.mean(0)


@pytest.mark.parametrize("positions", [60, 4096, 9001])  # more than one block, with a remainder
@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_whiten_solves_the_penalised_normal_equations(positions: int, penalty: float) -> None:
    pairs = pairs_of(positions, 7)
    white = whiten(Moments.of(pairs), penalty)
    found = white.fold(white.weight, white.bias)
    a, b = ridge(pairs, penalty)
    np.testing.assert_allclose(found.weight.numpy(), a, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias.numpy(), b, rtol=1e-3, atol=2e-3)
    assert found.weight.dtype == found.bias.dtype == torch.float32


def test_the_ridge_map_does_not_depend_on_the_units_of_its_inputs() -> None:
    pairs = pairs_of(200, 5)
    scales = torch.tensor([0.1, 1.0, 5.0, 2.0, 20.0])
    other = Pairs(pairs.h * scales, pairs.t + pairs.h * scales - pairs.h)  # the same t - h
    one, two = (
        w.fold(w.weight, w.bias)
        for w in (whiten(Moments.of(pairs), 0.1), whiten(Moments.of(other), 0.1))
    )
    torch.testing.assert_close(two(other.h) - other.h, one(pairs.h) - pairs.h, rtol=0.01, atol=0.01)


def test_whitened_inputs_are_round() -> None:
    pairs = pairs_of(500, 6)
    white = whiten(Moments.of(pairs), 1e-6)
    x = (pairs.h.double() - white.mean) @ white.forward
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(6).double(), atol=1e-3, rtol=0)


def test_inputs_that_never_change_get_none_of_the_map() -> None:
    pairs = pairs_of(300, 6)
    h = pairs.h.clone()
    h[:, 2], h[:, 4] = 0.0, 12.5
    white = whiten(Moments.of(Pairs(h, pairs.t)), 1e-2)
    found = white.fold(white.weight, white.bias)
    live = [0, 1, 3, 5]
    assert all(p.isfinite().all() for p in (found.weight, found.bias, white.forward))
    assert found.weight[:, [2, 4]].abs().max() < 1e-5
    x, y = h[:, live].double(), (pairs.t - h).double()
    xc, yc = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    c = xc.T @ xc / len(xc)
    a = np.linalg.solve(c + 1e-2 * np.diag(np.diag(c)), xc.T @ yc / len(xc)).T
    np.testing.assert_allclose(found.weight[:, live].numpy(), a, rtol=1e-3, atol=1e-5)
    # What varies in the teacher at a dead input's place is the bias's.
    bias = y.mean(0).numpy() - a @ x.mean(0).numpy()
    np.testing.assert_allclose(found.bias.numpy(), bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_low_rank_map_is_cut_in_whitened_inputs(rank: int) -> None:
    """There the cut loses the least squared error, which in plain inputs it does not."""
    pairs = pairs_of(2000, 6)
    white = whiten(Moments.of(pairs), 1e-3)
    up, down = low_rank(white.weight.float(), rank)
    cut = white.fold((up, down), white.bias)
    assert (cut.weight[0].shape, cut.weight[1].shape) == ((6, rank), (rank, 6))

    # Independently: C^1/2 from an SVD of the inputs, A C^1/2 cut by numpy.
    a, _ = ridge(pairs, 1e-3)
    x = pairs.h.double().numpy()
    x = x - x.mean(0)
    c = x.T @ x / len(x)
    c += 1e-3 * np.diag(np.diag(c))
    values, vectors = np.linalg.eigh(c)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    u, s, vh = np.linalg.svd(a @ root)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root)
    found = (cut.weight[0] @ cut.weight[1]).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    # At the mean every map says the same: b is not the full map's.
    mean = pairs.h.mean(0, keepdim=True)
    torch.testing.assert_close(cut(mean), pairs.t.mean(0, keepdim=True), atol=1e-2, rtol=1e-3)
    full = white.fold(white.weight, white.bias)
    if rank < 6:
        plain = low_rank(full.weight, rank)
        at_mean = full(mean) - mean - mean @ (plain[0] @ plain[1]).T
        worse = Affine(plain, at_mean[0])
        loss = [float((m(pairs.h) - pairs.t).square().mean()) for m in (full, cut, worse)]
        assert loss[0] < loss[1] < loss[2]


@pytest.mark.parametrize("rank", [None, 2])
def test_fold_is_the_map_of_whitened_inputs(rank: int | None) -> None:
    pairs = pairs_of(100, 5)
    white = whiten(Moments.of(pairs), 1e-2)
    weight = random(5, 5) if rank is None else (random(5, rank), random(rank, 5, seed=1))
    bias = random(5, seed=2)
    matrix = weight if isinstance(weight, Tensor) else weight[0] @ weight[1]
    x = (pairs.h.double() - white.mean) @ white.forward.T
    expected = pairs.h + white.scale * (x @ matrix.double().T + bias)
    folded = white.fold(weight, bias)
    torch.testing.assert_close(folded(pairs.h).double(), expected, rtol=1e-3, atol=5e-3)
    scale = math.sqrt(float(pairs.t.double().square().mean()))
    assert white.scale == pytest.approx(scale)


# ---------------------------------------------------------------- the loss


def test_soft_cross_entropy_and_its_gradient_are_autograds() -> None:
    logits, teacher = 5 * random(9, 40), 5 * random(9, 40, seed=1)
    before = logits.clone(), teacher.clone()
    loss, gradient = soft_cross_entropy(logits, teacher)
    z = logits.double().requires_grad_()
    expected = -(teacher.double().softmax(-1) * z.log_softmax(-1)).sum()
    expected.backward()
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), z.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before[0])
    assert torch.equal(teacher, before[1])


def test_sums_over_a_large_vocabulary_keep_their_digits() -> None:
    """Penalties and epochs are chosen by differences of a thousandth."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(100, 50_000, generator=generator) for _ in range(2))
    exact = -(teacher.double().softmax(-1) * logits.double().log_softmax(-1)).sum()
    loss, _ = soft_cross_entropy(logits, teacher)
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


def test_soft_cross_entropy_of_narrow_logits_is_computed_in_fp32() -> None:
    logits, teacher = 9 * random(5, 3000), 9 * random(5, 3000, seed=1)
    narrow = logits.bfloat16(), teacher.bfloat16()
    torch.testing.assert_close(
        soft_cross_entropy(*narrow), soft_cross_entropy(*(x.float() for x in narrow))
    )


@pytest.mark.parametrize("blocks", [False, True])
@torch.no_grad()
def test_measure_is_a_naive_loop(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny("llama"))
    if blocks:
        monkeypatch.setattr(Backbone, "logits_rows", lambda *_: 4)
    h, t, full = (random(11, D, seed=seed) for seed in (1, 2, 3))
    t[3] = 1.5 * h[3]  # the norm takes scale away: here the logit lens agrees with its teacher
    full[5] = h[5]
    lens = Affine(0.05 * random(D, D, seed=4), 0.1 * random(D, seed=5))
    sums: dict[str, list[float]] = {}
    for i in range(11):
        q, p, f = (
            backbone.logits(x[None])[0].double().softmax(-1).tolist()
            for x in (h[i] + lens.weight @ h[i] + lens.bias, t[i], full[i])
        )
        best = [max(range(len(x)), key=x.__getitem__) for x in (q, p, f)]
        for name, value in {
            "ce": -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
            "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            "entropy": -sum(b * math.log(b) for b in q),
            "agree_teacher": float(best[0] == best[1]),
            "agree_full": float(best[0] == best[2]),
        }.items():
            sums.setdefault(name, []).append(value)
    expected = {name: sum(values) / 11 for name, values in sums.items()}
    found = measure(backbone, lens, Pairs(h, t), full)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < measure(backbone, lambda x: x, Pairs(h, t), full)["agree_full"] < 1
    assert measure(backbone, lens, Pairs(h, t)).keys() == expected.keys() - {"agree_full"}


# ---------------------------------------------------------------- states

IDS = [tuple(row) for row in random_ids(9, 7).tolist()]
SHARED = [IDS[0][:4] + IDS[8][:3], IDS[1][:6] + IDS[7][:1]]
REQUESTS = [scoring.Request(ids[:2], ids[2:]) for ids in (*IDS, *SHARED)]
LAYERS = (0, 1, 3)


def layout(backbone: Backbone, packed: bool = True) -> scoring.Layout:
    config = backbone.model.config
    packed = packed and backbone.packs and may_pack(config)
    return scoring.Layout(60, packed, window(config), backbone.crossover, batch_size=4)


def where(job: states.Job) -> list[tuple[int, int, int]]:
    """(start id, token id, position) of each position that is kept, in the order of its rows."""
    batch = job.batch
    return [
        (int(batch.start_ids[k]), int(batch.token_ids[k]), int(batch.scored_positions[k]))
        for k in job.kept
    ]


def occurrences(place: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The beginnings of sequences that end in this token at this place."""
    start, token, position = place
    wholes = [r.context + r.continuation[:-1] for r in REQUESTS]
    return list(
        dict.fromkeys(
            ids[: position + 1]
            for ids in wholes
            if len(ids) > position and ids[0] == start and ids[position] == token
        )
    )


@pytest.mark.parametrize(
    ("family", "packed"), [("llama", True), ("llama", False), ("gemma2", True), ("gpt2", False)]
)
@torch.no_grad()
def test_states_are_those_of_each_sequence_alone(family: str, packed: bool, tmp_path: Path) -> None:
    model = tiny(family)
    backbone = Backbone(model)
    todo = states.jobs(REQUESTS, layout(backbone, packed), 30, 8, seed=1)
    found = states.collect(backbone, todo, LAYERS, True, tmp_path)
    assert len(todo) > 1
    assert found.full.shape == (8, D)
    row = 0
    for job in todo:
        assert job.offset == row
        for place in where(job):
            (ids,) = occurrences(place)
            alone = torch.tensor([ids])
            hidden = backbone.hidden_states(alone)
            torch.testing.assert_close(found.full[row], hidden[L][0, -1], atol=1e-4, rtol=1e-4)
            for i, layer in enumerate(LAYERS):
                h, t = found.hidden[i][row], found.teacher[i][row]
                torch.testing.assert_close(h, hidden[layer][0, -1], atol=1e-4, rtol=1e-4)
                naive = naive_tail(model, hidden, 0, len(ids) - 1, layer, alone, [0, 1], True)
                torch.testing.assert_close(backbone.logits(t[None])[0], naive, atol=2e-4, rtol=1e-4)
            row += 1
    assert row == 8


def test_the_full_model_teaches_the_tuned_lens(tmp_path: Path) -> None:
    backbone = Backbone(tiny("llama"))
    todo = states.jobs(REQUESTS, layout(backbone), 30, 25, seed=1)
    spade = states.collect(backbone, todo, LAYERS, True, tmp_path / made(tmp_path, "spade"))
    full = states.collect(backbone, todo, LAYERS, False, tmp_path / made(tmp_path, "full"))
    assert len(full.teacher) == len(LAYERS)
    assert all(torch.equal(teacher, spade.full) for teacher in full.teacher)
    assert all(map(torch.equal, full.hidden, spade.hidden))
    assert not any(torch.equal(teacher, spade.full) for teacher in spade.teacher)


def made(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def drawn(n: int, seed: int, requests: list[scoring.Request] = REQUESTS) -> list[tuple]:
    plan = scoring.Layout(60, packed=True, batch_size=4)
    return [place for job in states.jobs(requests, plan, 30, n, seed) for place in where(job)]


def test_positions_are_drawn_by_the_seed_and_never_the_first() -> None:
    everything = drawn(10**6, seed=0)
    prefixes = {
        ids[:i]
        for ids in (r.context + r.continuation[:-1] for r in REQUESTS)
        for i in range(3, len(ids) + 1)
    } | {r.context for r in REQUESTS}
    assert len(everything) == len(prefixes)  # what documents share is there once
    for n in (1, 7, 20):
        some = drawn(n, seed=0)
        assert len(some) == n
        assert set(some) <= set(everything)
        assert drawn(n, seed=0) == some
    assert drawn(20, seed=0) != drawn(20, seed=1)
    first = [scoring.Request(ids[:1], ids[1:]) for ids in IDS]
    assert {position for *_, position in drawn(10**6, 0, first)} == {1, 2, 3, 4, 5}
    assert not states.jobs([scoring.Request((5,), (6,))], scoring.Layout(60), 30, 9, 0)


def test_every_position_can_be_drawn() -> None:
    seen = {place for seed in range(60) for place in drawn(5, seed)}
    assert seen == set(drawn(10**6, 0))


@pytest.mark.parametrize("spade", [True, False])
def test_two_ranks_write_what_one_writes(spade: bool, tmp_path: Path) -> None:
    backbone = Backbone(tiny("llama"))
    todo = states.jobs(REQUESTS, layout(backbone), 30, 25, seed=1)
    alone, both = tmp_path / made(tmp_path, "one"), tmp_path / made(tmp_path, "two")
    states.collect(backbone, todo, LAYERS, spade, alone)
    half = states.collect(backbone, todo, LAYERS, spade, both, rank=0, world_size=2)
    assert not half.full[todo[1].offset].any()
    assert half.full[todo[0].offset].any()
    states.collect(backbone, todo, LAYERS, spade, both, rank=1, world_size=2)
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in both.iterdir())
    assert len(names) == (8 if spade else 5)
    for name in names:
        assert (alone / name).read_bytes() == (both / name).read_bytes(), name


def test_the_last_bits_do_not_depend_on_who_computed_the_batches_before(tmp_path: Path) -> None:
    """Of sequences that begin with many different tokens."""
    model = tiny("llama", hidden_size=192, intermediate_size=512)
    sequences = random_ids(60, 6).tolist()
    requests = [scoring.Request(tuple(ids[:2]), tuple(ids[2:])) for ids in sequences]
    todo = states.jobs(requests, layout(Backbone(model)), 30, 200, seed=1)
    assert len(todo) > 5
    alone, both = tmp_path / made(tmp_path, "one"), tmp_path / made(tmp_path, "two")
    states.collect(Backbone(model), todo, LAYERS, True, alone)
    for rank in (0, 1):
        states.collect(Backbone(model), todo, LAYERS, True, both, rank=rank, world_size=2)
    for path in alone.iterdir():
        assert path.read_bytes() == (both / path.name).read_bytes(), path.name


def test_batches_that_are_done_are_not_computed_again(tmp_path: Path) -> None:
    backbone = Backbone(tiny("llama"))
    todo = states.jobs(REQUESTS, layout(backbone), 30, 25, seed=1)
    calls: list[int] = []
    stop_at: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)
        if stop_at and len(calls) > stop_at[0]:
            raise KeyboardInterrupt

    handle = backbone._layers[0].register_forward_hook(count)
    try:
        states.collect(backbone, todo, LAYERS, True, tmp_path)
        whole, files = len(calls), {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        calls.clear()
        states.collect(backbone, todo, LAYERS, True, tmp_path)
        assert calls == []
        # Stopped half-way: what follows the last whole batch is computed, and that alone.
        other = tmp_path / made(tmp_path, "other")
        stop_at.append(whole // 2)
        with pytest.raises(KeyboardInterrupt):
            states.collect(backbone, todo, LAYERS, True, other)
        done = sum((other / "done.bin").read_bytes())
        assert 0 < done < len(todo)
        stop_at.clear()
        calls.clear()
        states.collect(backbone, todo, LAYERS, True, other)
        assert 0 < len(calls) < whole
    finally:
        handle.remove()
    assert {p.name: p.read_bytes() for p in other.iterdir()} == files


def test_a_full_disk_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone(tiny("llama"))
    todo = states.jobs(REQUESTS, layout(backbone), 30, 25, seed=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"MB more in .*: No space left.*--resume.*positions"):
            states.collect(backbone, todo, LAYERS, True, tmp_path)
    found = states.collect(backbone, todo, LAYERS, True, tmp_path)  # there is room again
    assert found.full.any(-1).all()


def test_the_digest_is_of_all_token_ids() -> None:
    a, b = scoring.Request((1, 2), (3,)), scoring.Request((1,), (2, 3))
    assert len({states.digest(x) for x in ([a], [b], [a, b], [b, a], [])}) == 5
    assert states.digest([a]) == states.digest([replace(a)])


def test_moved_jobs_lie_behind_the_others() -> None:
    (job, *_) = states.jobs(REQUESTS, scoring.Layout(60), 30, 5, 0)
    assert states.moved(job, 7).offset == job.offset + 7
    assert states.count([job, states.moved(job, 7)]) == 2 * len(job.kept)


# ---------------------------------------------------------------- descent

FAST = Recipe(epochs=3, batch=16, learning_rate=4e-3)


@functools.cache
def the_backbone() -> Backbone:
    return Backbone(tiny("llama").requires_grad_(False))


def toy(positions: int = 150, noise: float = 0.05) -> tuple[Backbone, Pairs, Pairs]:
    """A teacher that a map can learn, but not by least squares alone: outliers mislead it."""
    h = random(positions, D) * torch.logspace(-0.5, 0.7, D)
    t = h + h @ (0.3 * random(D, D, seed=1)).T + random(D, seed=2)
    t = t + noise * random(positions, D, seed=3)
    t[::7] *= 6.0  # the norm takes it away: the same distributions, other squared errors
    n = positions * 2 // 3
    return the_backbone(), Pairs(h[:n], t[:n]), Pairs(h[n:], t[n:])


def run(descent: Descent, progress: Progress | None = None) -> list[Progress]:
    first = progress or descent.start()
    return [first, *descent.epochs(first)]


@pytest.mark.parametrize(("rank", "bf16"), [(None, True), (4, False)])
def test_descent_learns_and_ends_no_worse_than_ridge(rank: int | None, bf16: bool) -> None:
    backbone, training, held_out = toy()
    recipe = replace(FAST, rank=rank, bf16=bf16, epochs=6)
    states_ = run(Descent(backbone, training, held_out, recipe, layer=2))
    last = states_[-1]
    assert last.finished
    assert not any(p.finished for p in states_[:-1])
    assert last.stopped is None
    assert last.losses[0] <= last.ridge
    assert min(last.losses) < last.losses[0] - 0.05
    assert len(last.losses) == len(states_)
    # The map kept is the one that the losses speak of.
    assert measure(backbone, last.best, held_out)["ce"] == pytest.approx(min(last.losses), abs=1e-5)
    on_training = [measure(backbone, p.best, training)["ce"] for p in (states_[0], last)]
    assert on_training[1] < on_training[0] - 0.05


def test_epochs_that_are_no_better_are_passed_over_and_the_best_is_kept() -> None:
    """While the learning rate is high the loss may rise above that of the ridge map."""
    backbone, training, held_out = toy()
    for rate, best in ((0.1, 6), (30.0, 0)):  # high, and far too high
        recipe = replace(FAST, learning_rate=rate, epochs=6)
        states_ = run(Descent(backbone, training, held_out, recipe, layer=2))
        last = states_[-1]
        assert last.finished and len(last.losses) == 7
        assert last.losses[1] > last.losses[0]
        assert last.losses.index(min(last.losses)) == best
        assert torch.equal(last.best.weight, states_[best].best.weight)
        kept = measure(backbone, last.best, held_out)["ce"]
        assert kept == pytest.approx(last.losses[best], abs=1e-5)


def test_no_epochs_is_the_ridge_solution() -> None:
    backbone, training, held_out = toy()
    descent = Descent(backbone, training, held_out, replace(FAST, epochs=0), layer=2)
    (only,) = run(descent)
    assert only.finished
    white = whiten(Moments.of(training), descent.ridge.penalty)
    expected = white.fold(white.weight, white.bias)
    torch.testing.assert_close(only.best.weight, expected.weight)
    assert only.losses == [only.ridge]
    assert only.ridge == pytest.approx(measure(backbone, expected, held_out)["ce"], abs=1e-5)


@pytest.mark.parametrize("rank", [None, 4])
def test_each_layer_takes_the_penalty_that_is_best_on_held_out_positions(
    rank: int | None,
) -> None:
    """Few noisy positions need a large one, many clean ones a small one."""
    chosen = []
    for positions, noise in ((60, 3.0), (900, 0.01)):
        backbone, training, held_out = toy(positions, noise)
        recipe = replace(FAST, rank=rank, penalties=(0.1, 1e-3, 1.0))
        moments, losses = Moments.of(training), {}
        for penalty in recipe.penalties:
            white = whiten(moments, penalty)
            weight = white.weight.float() if rank is None else low_rank(white.weight.float(), rank)
            losses[penalty] = measure(backbone, white.fold(weight, white.bias), held_out)["ce"]
        descent = Descent(backbone, training, held_out, recipe, layer=2)
        assert descent.ridge.penalty == min(losses, key=losses.__getitem__)
        assert descent.start().ridge == pytest.approx(min(losses.values()), abs=1e-5)
        chosen.append(descent.ridge.penalty)
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize("rank", [None, 4])
def test_where_ridge_is_worse_than_nothing_the_start_is_the_logit_lens(rank: int | None) -> None:
    backbone, training, _ = toy()
    held_out = Pairs(training.h, training.h.clone())  # here the identity is perfect
    recipe = replace(FAST, rank=rank)
    descent = Descent(backbone, training, held_out, recipe, layer=2)
    start = descent.start()
    assert start.losses[0] < start.ridge
    h = random(5, D, seed=9)
    torch.testing.assert_close(start.best(h), h, atol=1e-6, rtol=0)
    # And from there training does move.
    list(descent.epochs(start))
    assert (descent.map(h) - h).abs().max() > 1e-3


def test_another_seed_or_layer_takes_another_way() -> None:
    backbone, training, held_out = toy()
    ends = [
        run(Descent(backbone, training, held_out, replace(FAST, seed=seed), layer))[-1].losses
        for seed, layer in ((0, 2), (0, 2), (1, 2), (0, 3))
    ]
    assert ends[0] == ends[1]
    assert len({tuple(losses) for losses in ends}) == 3


def same_progress(a: Progress, b: Progress) -> None:
    assert (a.losses, a.ridge, a.penalty) == (b.losses, b.ridge, b.penalty)
    assert (a.finished, a.stopped) == (b.finished, b.stopped)
    flat = []
    for p in (a, b):
        weight = (p.best.weight,) if isinstance(p.best.weight, Tensor) else p.best.weight
        flat.append([*weight, p.best.bias, *p.tensors])
    assert len(flat[0]) == len(flat[1])
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize(("rank", "bf16"), [(None, False), (4, True)])
def test_going_on_from_a_file_is_bit_equal_to_not_stopping(
    rank: int | None, bf16: bool, tmp_path: Path
) -> None:
    backbone, training, held_out = toy()
    recipe = replace(FAST, rank=rank, bf16=bf16, epochs=3)

    def anew() -> Descent:
        return Descent(backbone, training, held_out, recipe, layer=2)

    whole = []
    path = tmp_path / "layer-2.safetensors"
    for i, progress in enumerate(run(anew())):
        progress.save(tmp_path / f"{i}.safetensors")
        whole.append(progress)
    assert len(whole) == 4
    assert len(list(tmp_path.iterdir())) == 4  # nothing half written
    for i in range(len(whole)):
        loaded = Progress.load(tmp_path / f"{i}.safetensors")
        same_progress(loaded, whole[i])
        for progress, expected in zip(anew().epochs(loaded), whole[i + 1 :], strict=True):
            same_progress(progress, expected)
    # Stopped after each epoch.
    progress, descent = whole[0], None
    for expected in whole[1:]:
        progress.save(path)
        descent = anew()
        progress = next(descent.epochs(Progress.load(path)))
        same_progress(progress, expected)


finite = st.floats(-1e9, 1e9)


@settings(max_examples=20)
@given(
    losses=st.lists(finite | st.just(math.inf), min_size=1, max_size=5),
    ridge=finite,
    penalty=finite,
    finished=st.booleans(),
    stopped=st.none() | st.text(max_size=20),
    metrics=st.dictionaries(st.text(max_size=8), finite, max_size=3),
    factors=st.booleans(),
    n=st.integers(0, 4),
)
def test_progress_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, factors: bool, n: int, **about: Any
) -> None:
    path = tmp_path_factory.mktemp("p") / "layer-1.safetensors"
    weight = (random(5, 2), random(2, 5)) if factors else random(5, 5)
    tensors = [random(i + 1, seed=i) for i in range(n)]
    before = Progress(best=Affine(weight, random(5)), tensors=tensors, seconds=1.5, **about)
    before.save(path)
    after = Progress.load(path)
    same_progress(before, after)
    assert (after.metrics, after.seconds) == (before.metrics, 1.5)


def test_a_loss_that_is_not_finite_stops_training_and_says_where() -> None:
    backbone, training, held_out = toy()
    for broken in (training.h, training.t):
        descent = Descent(backbone, training, held_out, replace(FAST, epochs=6), layer=3)
        progress = descent.epochs(descent.start())
        best = next(progress)
        kept = broken[17].clone()
        broken[17, 4] = math.inf
        last = next(progress)
        assert next(progress, None) is None
        broken[17] = kept
        step = stopped_at(descent, 17, epoch=2)
        assert last.finished
        assert last.stopped == f"layer 3, epoch 2, step {step}: loss nan"
        assert torch.equal(last.best.weight, best.best.weight)
        assert last.best.weight.isfinite().all()
        assert last.losses[:2] == best.losses
        assert last.losses[2] == math.inf


def stopped_at(descent: Descent, position: int, epoch: int) -> int:
    """Which step of the epoch meets the position."""
    generator = torch.Generator().manual_seed((0 * 1_000_003 + descent.layer) * 1_000_003 + epoch)
    order = torch.randperm(len(descent.training.h), generator=generator).tolist()
    return order.index(position) // descent.recipe.batch


def test_a_map_that_ran_away_in_the_last_step_is_told_too() -> None:
    """Every training loss was finite; the held-out one is not."""
    backbone, training, held_out = toy()
    recipe = replace(FAST, batch=10**6, learning_rate=1e38)  # one step, into infinity
    first, last = run(Descent(backbone, training, held_out, recipe, layer=3))
    assert last.finished
    assert last.stopped is not None
    assert last.stopped.startswith("layer 3, epoch 1")
    assert torch.equal(last.best.weight, first.best.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_counted(value: float) -> None:
    backbone, training, held_out = toy()
    training.h[3, 4] = value
    training.t[[5, 8], 0] = value
    training.t[3, 1] = value
    with pytest.raises(
        UserError, match=r"layer 2: .*before any training.*3 of 100 positions.*dtyp"
    ):
        # LAPACK refuses the ridge problem before any loss is computed, or gives no numbers.
        Descent(backbone, training, held_out, FAST, layer=2).start()


def test_held_out_states_that_are_not_finite_are_an_error() -> None:
    backbone, training, held_out = toy()
    held_out.t[0, 0] = math.nan
    with pytest.raises(UserError, match=r"layer 2: the loss is not finite before any training"):
        Descent(backbone, training, held_out, FAST, layer=2).start()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_a_damaged_progress_file_says_what_to_do(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "layer-2.safetensors"
    Progress([1.0], 1.0, 0.1, Affine(random(4, 4), random(4)), tensors=[random(3)]).save(path)
    assert load_file(path).keys() == {"best.0", "best.1", "state.0"}
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-40], "empty": b"", "text": b"no tensors"}[damage])
    with pytest.raises(UserError, match=r"layer-2\.safetensors is damaged.*delete it.*--resume"):
        Progress.load(path)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [one_cycle(i / 100) for i in range(101)]
    top = rates.index(max(rates))
    assert top == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1)
    assert 0 < rates[0] < 0.2
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_a_step_of_many_blocks_is_the_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, training, held_out = toy()
    whole = run(Descent(backbone, training, held_out, FAST, layer=2))[-1]
    monkeypatch.setattr(Descent, "_rows", property(lambda _: 5))
    parts = run(Descent(backbone, training, held_out, FAST, layer=2))[-1]
    assert parts.losses == pytest.approx(whole.losses, abs=1e-3)
