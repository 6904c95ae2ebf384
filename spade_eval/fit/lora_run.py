"""Finetune: documents -> accuracy before -> training -> best adapter -> accuracy after -> folder.

Checkpoints lie in a work folder beside the output. A run that was killed goes on there with
`resume`, from the last checkpoint that is whole; a finished one removes it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import peft
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import EarlyStoppingCallback

from spade_eval import __version__, adapter_files, lens_files, scoring
from spade_eval.errors import UserError
from spade_eval.fingerprint import fingerprint
from spade_eval.fit import documents, lora, questions, states
from spade_eval.fit.precision import bf16_is_fast
from spade_eval.fit.questions import Accuracy
from spade_eval.fit.run import _peak_memory_mb as peak_memory_mb
from spade_eval.fit.settings import require_free
from spade_eval.lm.cache import differences, weights_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from spade_eval.fit.lora_settings import LoraSettings
    from spade_eval.fit.questions import Question
    from spade_eval.lm.base import SpadeLM

log = logging.getLogger(__name__)


def finetune(
    lm: SpadeLM,
    settings: LoraSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    include_path: Path | list[Path] | None = None,
    command: str = "",
) -> adapter_files.Record:
    """Train an adapter for the model of `lm`, in place, and save it.

    Args:
        lm: The model, read at its last layer, and its tokenizer.
        settings: How to train.
        resume: Whether to go on in the work folder.
        overwrite: Whether to replace what is there.
        include_path: Folders of further tasks.
        command: For the adapter's card.

    Raises:
        UserError: Bad input; the checkpoints stay in the work folder.
    """
    require_free(settings.output, settings.work, resume, overwrite)
    lens_files.require_replaceable(settings.output, "adapter", adapter_files.FILES)
    processes = PartialState()
    processes.wait_for_everyone()  # or a slow one would find the work folder of the first
    tasks = documents.load_tasks(settings.tasks, include_path)
    asked = questions.validation(lm, tasks, seed=settings.seed, most=settings.validation_documents)
    training = _training(lm, tasks, settings.seed, asked)
    bf16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and bf16_is_fast(lm.device)
    )
    lm.mixed_precision_dtype = torch.bfloat16 if bf16 else None
    base = fingerprint(lm.model)
    _open_work(lm, settings, bf16, training, asked, overwrite and not resume)

    set_seed(settings.seed)
    model = peft.get_peft_model(
        lm.model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear",
        ),
    )

    def validate() -> dict[str, Accuracy]:
        model.eval()
        mine = questions.score(lm, asked[processes.process_index :: processes.num_processes])
        parts = gather_object([mine]) if processes.num_processes > 1 else [mine]
        scores = [0.0] * len(asked)
        for index, part in enumerate(parts):
            scores[index :: processes.num_processes] = part
        return questions.summary(asked, scores)

    before = _before(settings.work / "before.json", validate)
    examples = [lora.example(document, lm.layout) for document in training]
    begin = time.perf_counter()
    state = _train(model, lm, settings, examples, validate, bf16)
    seconds = time.perf_counter() - begin
    best = lora.checkpoint(settings.work, state.best_global_step)
    model.load_adapter(best, "default")
    model.eval()
    _require_active(model, lora.Collator(model)(examples[: settings.micro_batch_size]))
    after = validate()
    record = adapter_files.Record(
        base_model=lm._model_source,
        revision=None if lm.revision == "main" else str(lm.revision),
        fingerprint=base,
        tasks=settings.tasks,
        documents=len(training),
        multi_token_documents=sum(len(d.continuation) > 1 for d in training),
        validation_documents=len(asked),
        settings={k: v for k, v in asdict(settings).items() if k not in ("output", "tasks")}
        | {"precision": "bfloat16" if bf16 else "float32"},
        steps=state.global_step,
        best_step=state.best_global_step,
        before={name: asdict(accuracy) for name, accuracy in before.items()},
        after={name: asdict(accuracy) for name, accuracy in after.items()},
        bill={
            "resumed": resume,  # the seconds are then those of the last process
            "seconds_training": round(seconds, 1),
            "peak_memory_mb": peak_memory_mb(),
        },
        command=command,
        versions={
            "spade_eval": __version__,
            **{name: version(name) for name in ("peft", "transformers", "torch", "lm_eval")},
        },
    )
    if processes.is_main_process:
        adapter_files.save(model, record, settings.output)
    processes.wait_for_everyone()
    if processes.is_main_process:
        shutil.rmtree(settings.work)
    return record


# ------------------------------------------------------------------ steps


def _training(
    lm: SpadeLM, tasks: dict[str, Any], seed: int, asked: Sequence[Question]
) -> list[documents.Document]:
    """The tasks' training documents, without those that validation asks for."""
    found = documents.of_tasks(lm, tasks, "train", seed=seed)
    held_out = {question.answer for question in asked}
    training = [d for d in found if (*d.context, *d.continuation) not in held_out]
    if not training:
        raise UserError("All training documents are needed for validation: there are too few.")
    several = sum(len(d.continuation) > 1 for d in training)
    if several:
        log.warning(
            "%d of %d answers have several tokens; all of them are learned.",
            several, len(training),
        )  # fmt: skip
    return training


def _train(
    model: peft.PeftModel,
    lm: SpadeLM,
    settings: LoraSettings,
    examples: list[lora.Example],
    validate: Callable[[], dict[str, Accuracy]],
    bf16: bool,
) -> TrainerState:
    """Train, from the last whole checkpoint on if there is one; return the state at the end."""
    processes = PartialState()
    start = lora.last_whole(settings.work)
    if start is not None:
        state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            return state
    at_once = settings.micro_batch_size * processes.num_processes
    ordered = lora.in_training_order(examples, settings.epochs, settings.batch_size, settings.seed)
    steps = -(-len(ordered) // settings.batch_size)
    steps = min(steps, settings.max_steps or steps)
    interval = -(-len(examples) // (settings.batch_size * lora.EVALUATIONS))
    interval = min(interval, lora.MOST_STEPS)
    arguments = TrainingArguments(
        output_dir=str(settings.work.absolute()),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // at_once,
        num_train_epochs=1,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear" if settings.minutes is None else "constant_with_warmup",
        warmup_steps=min(lora.WARM_UP, -(-steps // 10)),
        bf16=bf16,
        use_cpu=lm.device.type == "cpu",
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        logging_steps=min(10, interval),
        metric_for_best_model="accuracy",
        greater_is_better=True,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=settings.seed,
        report_to="none",
    )
    callbacks: list[TrainerCallback] = [
        EarlyStoppingCallback(lora.PATIENCE),
        lora.KeepWhole(),
    ]
    if settings.minutes is not None:
        callbacks.append(lora.Budget(settings.minutes))

    def metrics() -> dict[str, float]:
        accuracy = validate()["all"]
        return {"accuracy": accuracy.mean, "accuracy_stderr": accuracy.stderr}

    trainer = lora.AnswerTrainer(
        metrics,
        model=model,
        args=arguments,
        train_dataset=ordered,
        data_collator=lora.Collator(model),
        compute_loss_func=lora.answer_loss,
        callbacks=callbacks,
        eval_dataset=ordered[:1],  # the Trainer asks for one; `metrics` has its own
    )
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return trainer.state


def _before(path: Path, validate: Callable[[], dict[str, Accuracy]]) -> dict[str, Accuracy]:
    """The accuracy without the adapter; from the work folder if it is known there."""
    if path.exists():
        return {name: Accuracy(**entry) for name, entry in json.loads(path.read_text()).items()}
    before = validate()
    if PartialState().is_main_process:
        _write(path, {name: asdict(accuracy) for name, accuracy in before.items()})
    return before


def _require_active(model: peft.PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """Make sure that the adapter changes what the model says.

    Raises:
        UserError: The logits are the same with and without it.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        adapted = model(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
    if torch.equal(adapted, plain):
        raise UserError(
            "The adapter is not active: the model's logits are the same with and without it. "
            "Train for more steps, or with a higher --learning_rate."
        )


def _open_work(
    lm: SpadeLM,
    settings: LoraSettings,
    bf16: bool,
    training: Sequence[documents.Document],
    asked: Sequence[Question],
    overwrite: bool,
) -> None:
    """Make the work folder, or make sure that the one there is of the same settings."""
    processes = PartialState()
    about = {
        **{k: v for k, v in asdict(settings).items() if k not in ("output", "precision")},
        "tasks": list(settings.tasks),
        "bf16": bf16,
        "processes": processes.num_processes,
        "weights": weights_digest(lm.model),
        "documents": states.digest(training),
        "validation": states.digest(
            [scoring.Request(*map(tuple, pair)) for q in asked for pair in q.requests]
        ),
        "package_version": __version__,
    }
    work = settings.work
    path = work / "settings.json"
    if processes.is_main_process:
        if overwrite and work.exists():
            shutil.rmtree(work)
        try:
            work.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _write(path, about)
            for torn in work.glob("checkpoint-*"):
                if not (torn / lora.WHOLE).exists():
                    shutil.rmtree(torn)
        except OSError as err:
            raise UserError(f"{work} cannot be written: {err.strerror}.") from err
    processes.wait_for_everyone()
    if differs := differences(json.loads(path.read_text()), about):
        raise UserError(
            f"{work} holds a run with other settings ({differs}). Resume with the same ones, or "
            "begin anew with --overwrite."
        )


def _write(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
