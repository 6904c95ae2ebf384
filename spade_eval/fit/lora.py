"""LoRA training on right answers, by the Trainer of transformers.

examples, in the order of training -> Trainer -> whole checkpoints -> the best adapter
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState, TrainerControl

from spade_eval.errors import UserError
from spade_eval.fit.examples import Collator, answer_loss, in_training_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from torch import Tensor

    from spade_eval.fit.examples import Example
    from spade_eval.fit.lora_settings import LoraSettings

WARM_UP = 10  # steps, or a tenth of a short training
EVALUATIONS = 4  # per epoch, or about so
MOST_STEPS = 50  # between two evaluations, each with a checkpoint
CHECKPOINT_SECONDS = 300  # a checkpoint without an evaluation, if steps take long
PATIENCE = 6  # evaluations without a better one, then training stops
WHOLE = "whole"  # marks a checkpoint that was written to its end


def train(
    model: PeftModel,
    examples: Sequence[Example],
    validate: Callable[[], dict[str, float]],
    settings: LoraSettings,
    *,
    bf16: bool,
    use_cpu: bool,
) -> TrainerState:
    """Train the adapter and leave its best weights in the model.

    Training starts from the last whole checkpoint in the work folder, if there is one, and goes
    the way that it would have gone without the break.

    Args:
        model: With the adapter at its first weights, which this depends on (`seed`).
        examples: See `spade_eval.fit.examples`.
        validate: Returns metrics, `accuracy` among them, the same ones on all processes.
        settings: How to train.
        bf16: Whether matrix products are computed in bfloat16.
        use_cpu: Whether to stay on the CPU if there is a GPU.

    Returns:
        The Trainer's state at the end.
    """
    start = last_whole(settings.work)
    if start is None or not _ended(state := _state(start)):
        trainer = _trainer(model, examples, validate, settings, bf16, use_cpu)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        state = trainer.state
    model.load_adapter(checkpoint(settings.work, state.best_global_step), "default")
    model.eval()
    return state


def require_active(model: PeftModel, batch: dict[str, Tensor]) -> None:
    """Make sure that the adapter changes what the model says.

    Args:
        model: The model with its adapter.
        batch: Of a `Collator`.

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
            "The adapter is not active: the model's logits are the same with and without it. Train "
            "for more steps, or with a higher --learning_rate."
        )


def _trainer(
    model: PeftModel,
    examples: Sequence[Example],
    validate: Callable[[], dict[str, float]],
    settings: LoraSettings,
    bf16: bool,
    use_cpu: bool,
) -> Trainer:
    ordered = in_training_order(examples, settings.epochs, settings.batch_size, settings.seed)
    steps = -(-len(ordered) // settings.batch_size)
    steps = min(steps, settings.max_steps or steps)
    interval = min(MOST_STEPS, -(-len(examples) // (settings.batch_size * EVALUATIONS)))
    arguments = TrainingArguments(
        output_dir=str(settings.work),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.micro_batches(PartialState().num_processes),
        num_train_epochs=1,  # all of ours in one
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        # Where time ends the training, nobody knows the last step.
        lr_scheduler_type="linear" if settings.minutes is None else "constant_with_warmup",
        warmup_steps=min(WARM_UP, steps // 10),
        bf16=bf16,
        use_cpu=use_cpu,
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
    # Several GPUs in sight would share each batch; `accelerate launch` gives each its own.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return AnswerTrainer(
        validate,
        model=model,
        args=arguments,
        train_dataset=ordered,
        eval_dataset=ordered[:1],  # the Trainer wants one; `validate` has its own
        data_collator=Collator(model),
        compute_loss_func=answer_loss,
        callbacks=[EarlyStoppingCallback(PATIENCE), Clock(settings.minutes), KeepWhole()],
    )


class AnswerTrainer(Trainer):
    """A Trainer that validates by a function of ours.

    Args:
        validate: Returns the metrics.
        **kwargs: The Trainer's.
    """

    def __init__(self, validate: Callable[[], dict[str, float]], **kwargs: Any):
        super().__init__(**kwargs)
        self._validate = validate

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, and tell the log and the callbacks as the Trainer does."""
        metrics = {f"eval_{name}": value for name, value in self._validate().items()}
        self.log(metrics)
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = told
        return metrics


class Clock(TrainerCallback, ExportableState):
    """Asks for checkpoints by time, and ends the training after some minutes.

    Those count from the first start of a run that was resumed.
    """

    def __init__(self, minutes: float | None):
        self.minutes = minutes
        self.seconds = 0.0
        self._last = self._saved = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Look at the clock; the last step ends with an evaluation and a checkpoint."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        over = self.minutes is not None and self.seconds >= 60 * self.minutes
        # The first step of a warm-up has a learning rate of zero.
        asked = [over and state.global_step > 1, now - self._saved >= CHECKPOINT_SECONDS]
        broadcast_object_list(asked)  # clocks differ, and all processes must do the same
        if asked[0]:
            control.should_training_stop = control.should_evaluate = True
        control.should_save |= any(asked)
        return control

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Count from here to the next checkpoint."""
        self._saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"minutes": self.minutes}, "attributes": {"seconds": self.seconds}}


# ------------------------------------------------------------------ checkpoints


class KeepWhole(TrainerCallback):
    """Marks a checkpoint when all its files are written, and only then drops older ones.

    The best and the last one stay. The Trainer's own limit would drop them too early: killed while
    it writes the next one, a run would have lost the best that its last whole one knows of.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when this process has written its files."""
        processes = PartialState()
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return
        last = checkpoint(Path(args.output_dir), state.global_step)
        (last / WHOLE).touch()
        for folder in last.parent.glob("checkpoint-*"):
            if folder not in (last, checkpoint(last.parent, state.best_global_step)):
                shutil.rmtree(folder)


def checkpoint(work: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return work / f"checkpoint-{step}"


def last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [mark.parent for mark in work.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def drop_torn(work: Path) -> None:
    """Remove checkpoints that were not written to their end."""
    for folder in work.glob("checkpoint-*"):
        if not (folder / WHOLE).exists():
            shutil.rmtree(folder)


def _state(folder: Path) -> TrainerState:
    return TrainerState.load_from_json(str(folder / "trainer_state.json"))


def _ended(state: TrainerState) -> bool:
    """Whether training had stopped at this checkpoint; the Trainer itself would go on."""
    return bool(state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"])
