"""Finetune: documents -> accuracy before -> training -> best adapter -> accuracy after -> folder.

Checkpoints lie in a work folder beside the output. A run that was killed goes on there with
`resume`, from the last checkpoint that is whole; a finished one removes it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import peft
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed

from spade_eval import __version__, adapter_files, adapters
from spade_eval.atomic import write_json
from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint, weights_digest
from spade_eval.fit import documents, examples, lora, questions, states, work
from spade_eval.fit.lora_settings import check_output
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.questions import Accuracy
from spade_eval.machine import machine
from spade_eval.memory import peak_memory
from spade_eval.scoring import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from spade_eval.fit.lora_settings import LoraSettings
    from spade_eval.fit.questions import Question
    from spade_eval.lm.layer import FixedLayerLM

log = logging.getLogger(__name__)


def finetune(
    lm: FixedLayerLM,
    settings: LoraSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    include_path: Path | list[Path] | None = None,
    command: str = "",
) -> adapter_files.Record:
    """Train an adapter for the model of `lm`, in place, and save it.

    Args:
        lm: The model, read at its last layer: it also scores the validation documents.
        settings: How to train.
        resume: Whether to go on in the work folder.
        overwrite: Whether to replace what is there.
        include_path: Folders of further tasks.
        command: For the adapter's card.

    Raises:
        UserError: Bad input; the checkpoints stay in the work folder.
    """
    check_output(settings, resume, overwrite)
    processes = PartialState()
    processes.wait_for_everyone()  # or a slow one would find the work folder of the first
    with work.at_work(settings.work, main=processes.is_main_process):
        return _finetune(lm, settings, resume, overwrite, include_path, command)


def _finetune(
    lm: FixedLayerLM,
    settings: LoraSettings,
    resume: bool,
    overwrite: bool,
    include_path: Path | list[Path] | None,
    command: str,
) -> adapter_files.Record:
    processes = PartialState()
    if getattr(lm.model, "peft_config", None):
        raise UserError(
            "The model has an adapter already; finetune begins a new one. Leave peft= out, or "
            "merge the adapter into its model first."
        )
    if lm.device.type == "cuda" and (lm.device.index or 0) != (processes.device.index or 0):
        raise UserError(
            f"--device {lm.device}: the Trainer moves the model to {processes.device}. Hide the "
            f"other GPUs instead: CUDA_VISIBLE_DEVICES={lm.device.index} and --device cuda."
        )
    settings.micro_batches(processes.num_processes)
    tasks = documents.load_tasks(settings.tasks, include_path)
    asked = questions.validation(
        lm,
        tasks,
        settings.validation_split,
        seed=settings.seed,
        most=settings.validation_documents,
    )
    training = _training(lm, tasks, settings.seed, asked)
    bf16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and bf16_is_fast(lm.device)
    )
    lm.mixed_precision_dtype = torch.bfloat16 if bf16 else None
    base = fingerprint(lm.model)
    _open_work(lm, settings, bf16, training, asked, overwrite and not resume)

    set_seed(settings.seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
    )
    model = peft.get_peft_model(lm.model, config)  # puts it into the layers that `lm` scores with
    # By the name PEFT would ask the Hub at every checkpoint; what is saved in the end has it.
    model.peft_config["default"].base_model_name_or_path = ""

    def validate() -> dict[str, Accuracy]:
        model.eval()
        return questions.accuracies(asked, _scores(lm, asked))

    def metrics() -> dict[str, float]:
        found = validate()["all"]
        return {"accuracy": found.mean, "accuracy_stderr": found.stderr or 0.0}

    before = _before(settings.work / "before.json", validate)
    learned = [examples.example(document, lm.layout) for document in training]
    begin = time.perf_counter()
    state = lora.train(
        model, learned, metrics, settings, bf16=bf16, use_cpu=lm.device.type == "cpu"
    )
    seconds = time.perf_counter() - begin
    lora.require_active(model, examples.Collator(model)(learned[: settings.micro_batch_size]))
    after = validate()
    if processes.is_main_process and after["all"].mean <= before["all"].mean:
        log.warning("On the validation documents the adapter is no better than the model alone.")
    record = adapter_files.Record(
        base_model=lm._model_source,
        revision=None if lm.revision == "main" else str(lm.revision),
        fingerprint=base,
        adapted=adapters.adapted(model),
        tasks=settings.tasks,
        documents=len(training),
        multi_token_documents=_multi_token(training),
        validation_documents=len(asked),
        settings={k: v for k, v in asdict(settings).items() if k not in ("output", "tasks")}
        | {"precision": "bfloat16" if bf16 else "float32"},
        steps=state.global_step,
        best_step=state.best_global_step,
        before={name: asdict(accuracy) for name, accuracy in before.items()},
        after={name: asdict(accuracy) for name, accuracy in after.items()},
        bill={
            "processes": processes.num_processes,
            "resumed": resume,  # the seconds and the machine are then the last's
            "seconds_training": round(seconds, 1),
            **peak_memory(),
            **machine(lm.device),
        },
        command=command,
        versions={
            "spade_eval": __version__,
            **{name: version(name) for name in ("peft", "transformers", "torch", "lm_eval")},
        },
    )
    if processes.is_main_process:
        adapter_files.save(model, record, settings.output)
        work.clear(settings.work)
    processes.wait_for_everyone()
    return record


# ------------------------------------------------------------------ steps


def _training(
    lm: FixedLayerLM, tasks: dict[str, Any], seed: int, asked: Sequence[Question]
) -> list[documents.Document]:
    """The tasks' training documents, without those that validation asks for."""
    found = documents.of_tasks(lm, tasks, "train", seed=seed)
    held_out = {question.answer for question in asked}
    training = [d for d in found if (*d.context, *d.continuation) not in held_out]
    if not training:
        raise UserError(
            "Validation needs all training documents there are. Name more tasks, or give fewer "
            "--validation_documents."
        )
    if several := _multi_token(training):
        log.warning(
            "%d of %d answers have several tokens; all of them are learned.",
            several, len(training),
        )  # fmt: skip
    return training


def _multi_token(training: Sequence[documents.Document]) -> int:
    return sum(len(document.continuation) > 1 for document in training)


def _scores(lm: FixedLayerLM, asked: Sequence[Question]) -> list[float]:
    """The questions' accuracies; each process scores every w-th question."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    mine = questions.score(lm, asked[rank::processes])
    scores = [0.0] * len(asked)
    for index, part in enumerate(gather_object([mine])):
        scores[index::processes] = part
    return scores


def _before(path: Path, validate: Callable[[], dict[str, Accuracy]]) -> dict[str, Accuracy]:
    """The accuracy without the adapter, whose first weights change nothing; known if resumed."""
    if path.exists():
        return {name: Accuracy(**entry) for name, entry in json.loads(path.read_text()).items()}
    before = validate()
    if PartialState().is_main_process:
        write_json(path, {name: asdict(accuracy) for name, accuracy in before.items()})
    return before


def _open_work(
    lm: FixedLayerLM,
    settings: LoraSettings,
    bf16: bool,
    training: Sequence[documents.Document],
    asked: Sequence[Question],
    anew: bool,
) -> None:
    """Make sure that the work folder is of the same settings."""
    processes = PartialState()
    about = {
        **{k: v for k, v in asdict(settings).items() if k not in ("output", "precision")},
        "tasks": list(settings.tasks),
        "bf16": bf16,
        "processes": processes.num_processes,
        "weights": weights_digest(lm.model),
        "documents": states.digest(training),
        "validation": states.digest(
            [Request(*map(tuple, pair)) for question in asked for pair in question.requests]
        ),
        "package_version": __version__,
    }
    work.claim(
        settings.work,
        about,
        anew=anew,
        main=processes.is_main_process,
        wait=processes.wait_for_everyone,
    )
    if processes.is_main_process:
        lora.drop_torn(settings.work)
    processes.wait_for_everyone()
