"""Fit a lens: documents -> states -> one map per layer -> table -> folder.

Everything on the way lies in a work folder beside the output. A run that was killed goes on there
with `resume`; a finished one removes it. Of several processes, each computes every w-th batch of
states and fits every w-th map, so the result does not depend on their number.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from spade_eval import __version__, scoring
from spade_eval.errors import UserError
from spade_eval.fingerprint import adapter_fingerprint, fingerprint, weights_digest
from spade_eval.fit import documents, states, work
from spade_eval.fit.descent import Descent, Recipe
from spade_eval.fit.maps import Pairs, measure
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.progress import Progress
from spade_eval.fit.settings import check_output, layer_list
from spade_eval.lens import LinearLens
from spade_eval.lens_config import LensConfig
from spade_eval.lens_match import owner
from spade_eval.machine import machine
from spade_eval.memory import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from spade_eval.fit.settings import FitSettings
    from spade_eval.lm.base import SpadeLM

log = logging.getLogger(__name__)

HELD_OUT = 1 / 10  # share of the documents, and of the positions, that decides when to stop
# Documents are read until they hold this many times the positions asked for, of which a tenth or so
# is drawn: positions of many documents teach more than all positions of a few.
TOKENS_PER_POSITION = 8
ANSWERS_PER_POSITION = 1.2  # of answer positions nearly all are needed, the model tokens being dear


def fit(
    lm: SpadeLM,
    settings: FitSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    include_path: Path | list[Path] | None = None,
    command: str = "",
) -> LinearLens:
    """Fit and save a lens for the model of `lm`.

    Args:
        lm: The model and its tokenizer.
        settings: What to fit.
        resume: Whether to go on in the work folder.
        overwrite: Whether to replace what is there.
        include_path: Folders of further tasks.
        command: For the lens's card.

    Raises:
        UserError: Bad input; what has been computed stays in the work folder.
    """
    check_output(settings, resume, overwrite)
    lm.barrier()  # or a slow process would take the first one's work folder for another run's
    with work.at_work(settings.work, main=lm.rank == 0):
        return _fit(lm, settings, resume, overwrite, include_path, command)


def _fit(
    lm: SpadeLM,
    settings: FitSettings,
    resume: bool,
    overwrite: bool,
    include_path: Path | list[Path] | None,
    command: str,
) -> LinearLens:
    lm.model.requires_grad_(False)  # or descent would spend a third of its time on its gradients
    backbone, layers = lm.backbone, layer_list(settings.layers, lm.backbone.n_layers)
    if settings.rank is not None and settings.rank > backbone.width:
        raise UserError(
            f"rank={settings.rank} is out of range: this model's maps have 1..{backbone.width}."
        )
    training, held_out = _documents(lm, settings, include_path)
    requests = [
        [_request(d, settings.positions, lm.layout) for d in part] for part in (training, held_out)
    ]
    most = (settings.max_positions, max(1, int(settings.max_positions * HELD_OUT)))
    drawn = [
        states.jobs(part, lm.layout, backbone.most_tokens, n, settings.seed)
        for part, n in zip(requests, most, strict=True)
    ]
    if not drawn[0] or not drawn[1]:
        raise UserError("The documents hold no position to train on: they are too short.")
    recipe = Recipe(
        epochs=settings.epochs,
        rank=settings.rank,
        seed=settings.seed,
        bf16=bf16_is_fast(backbone.device),
    )
    _open_work(lm, settings, asdict(recipe), layers, requests, overwrite and not resume)

    begin = time.perf_counter()
    n = states.count(drawn[0])
    todo = [*drawn[0], *(states.moved(job, n) for job in drawn[1])]
    found = states.collect(
        backbone, todo, layers, settings.decoder == "l_spade", settings.work, lm.rank, lm.world_size
    )
    lm.barrier()
    seconds = time.perf_counter() - begin
    for index, layer in list(enumerate(layers))[lm.rank :: lm.world_size]:
        pairs = Pairs(found.hidden[index].to(lm.device), found.teacher[index].to(lm.device))
        _fit_layer(lm, pairs, found.full.to(lm.device), n, recipe, layer, settings.work)
    lm.barrier()

    parts = {layer: Progress.load(settings.work / f"layer-{layer}.safetensors") for layer in layers}
    config = LensConfig(
        decoder=settings.decoder,
        base_model=lm._model_source,
        n_layers=backbone.n_layers,
        width=backbone.width,
        layers=tuple(layers),
        rank=settings.rank,
        revision=None if lm.revision == "main" else str(lm.revision),
        **owner(lm.model),
        teacher="spade" if settings.decoder == "l_spade" else "model",
        positions=settings.positions,
        tasks=settings.tasks or (str(settings.text),),
        split=settings.split if settings.tasks else "",
        documents=len(training),
        n_positions=n,
        tokens=sum(job.batch.tokens for job in todo),
        seed=settings.seed,
        metrics={layer: part.metrics for layer, part in parts.items()},
        bill={
            "held_out_documents": len(held_out),
            "held_out_positions": states.count(todo) - n,
            "resumed": resume,  # the states' seconds and the machine are then the last's
            "precision": "bfloat16" if recipe.bf16 else "float32",  # of the head while training
            "seconds_states": round(seconds, 3),
            "seconds_training": round(sum(part.seconds for part in parts.values()), 3),
            **peak_memory(),
            **machine(lm.device),
        },
        command=command,
        package_version=__version__,
    )
    lens = LinearLens(config).to(getattr(torch, settings.dtype))
    for layer, part in parts.items():
        lens.set_map(layer, part.best.weight, part.best.bias)
        if part.stopped:
            log.warning("Training stopped early, and the best map before is kept: %s", part.stopped)
    if lm.rank == 0:
        lens.save_pretrained(settings.output)
    lm.barrier()
    if lm.rank == 0:
        work.clear(settings.work)
    return lens


# ------------------------------------------------------------------ steps


def _documents(
    lm: SpadeLM, settings: FitSettings, include_path: Path | list[Path] | None
) -> tuple[list[documents.Document], list[documents.Document]]:
    """Documents for training, and those held out."""
    answers = settings.positions == "answer"
    wanted = ANSWERS_PER_POSITION if answers else TOKENS_PER_POSITION
    stream: Iterable[documents.Document]
    if settings.text is not None:
        stream = documents.from_text(lm, settings.text, seed=settings.seed)
    else:
        stream = documents.from_tasks(
            lm,
            settings.tasks,
            settings.split,
            include_path,
            seed=settings.seed,
            most=max(100, int(settings.max_positions * (wanted if answers else 1 / 4))),
        )

    def size(document: documents.Document) -> int:
        return len(document.continuation) + (0 if answers else len(document.context))

    found = documents.enough(stream, size, wanted * settings.max_positions, share=HELD_OUT)
    sources = list(dict.fromkeys((d.task, d.doc_id) for d in found))
    if len(sources) < 2:
        raise UserError(
            "There is one document only; a lens needs at least two, one of them to be held out."
        )
    held = set(sources[: max(1, int(len(sources) * HELD_OUT))])
    training = [d for d in found if (d.task, d.doc_id) not in held]
    return training, [d for d in found if (d.task, d.doc_id) in held]


def _request(
    document: documents.Document, positions: str, layout: scoring.Layout
) -> scoring.Request:
    """The positions that are read: those that score the answer, or all after the first."""
    if positions == "answer":
        return document
    # Cut first: what was a context, and may be longer than the model takes, is read from now on.
    whole = (*scoring.feed(document, layout)[0], document.continuation[-1])
    cut = min(2, len(whole) - 1)
    return scoring.Request(whole[:cut], whole[cut:])


def _fit_layer(
    lm: SpadeLM,
    pairs: Pairs,
    full: torch.Tensor,
    n: int,
    recipe: Recipe,
    layer: int,
    folder: Path,
) -> None:
    """Fit the map of one layer and measure it; leave both in the work folder."""
    path = folder / f"layer-{layer}.safetensors"
    progress = Progress.load(path) if path.exists() else None
    if progress is not None:
        if progress.metrics:
            return
        progress.best = progress.best.to(pairs.h.device)
        # What is saved is written in the inputs that this penalty has whitened.
        recipe = replace(recipe, penalties=(progress.penalty,))
    begin = time.perf_counter()
    before = 0.0 if progress is None else progress.seconds
    held_out = Pairs(pairs.h[n:], pairs.t[n:])
    descent = Descent(lm.backbone, Pairs(pairs.h[:n], pairs.t[:n]), held_out, recipe, layer)
    first = progress or descent.start()
    progress = first
    bar = tqdm(
        total=recipe.epochs,
        initial=len(progress.losses) - 1,
        desc=f"Layer {layer}",
        unit="epoch",
        disable=lm.rank != 0,
        postfix={"held-out CE": f"{progress.losses[-1]:.3f}"},
    )
    for progress in descent.epochs(first):
        progress.seconds = before + time.perf_counter() - begin
        progress.save(path)
        bar.update()
        bar.set_postfix({"held-out CE": f"{progress.losses[-1]:.3f}"})
    bar.close()
    progress.seconds = before + time.perf_counter() - begin
    lens = measure(lm.backbone, progress.best, held_out, full[n:])
    plain = measure(lm.backbone, lambda h: h, held_out, full[n:])
    progress.metrics = {
        **lens,
        "ce_ridge": progress.ridge,
        "penalty": progress.penalty,
        "epochs": len(progress.losses) - 1,
        **{f"logit_lens_{name}": value for name, value in plain.items()},
    }
    progress.save(path)


def _open_work(
    lm: SpadeLM,
    settings: FitSettings,
    recipe: dict[str, Any],
    layers: Sequence[int],
    requests: Sequence[Sequence[scoring.Request]],
    anew: bool,
) -> None:
    """Make sure that the work folder is of the same settings."""
    about = {
        "decoder": settings.decoder,
        "tasks": list(settings.tasks),
        "text": str(settings.text),
        "split": settings.split,
        "layers": list(layers),
        "positions": settings.positions,
        "max_positions": settings.max_positions,
        **recipe,
        "penalties": list(recipe["penalties"]),
        "model": fingerprint(lm.model),
        "weights": weights_digest(lm.model),
        "adapter": adapter_fingerprint(lm.model),
        "dtype": str(lm.model.dtype),
        "documents": [states.digest(part) for part in requests],
        "batch_size": lm.layout.batch_size,
        "package_version": __version__,
    }
    work.claim(settings.work, about, anew=anew, main=lm.rank == 0, wait=lm.barrier)
