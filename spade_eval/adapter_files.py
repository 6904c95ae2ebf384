"""The folder of an adapter: a normal PEFT adapter, and what made it.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's and all that PEFT reads; beside
them stand a model card and `finetune.json`, a record of the training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from spade_eval.atomic import replacing_folder, write_json
from spade_eval.default_model import DEFAULT_MODEL_NAME
from spade_eval.lens_config import hub_id, table

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD, CARD = "finetune.json", "README.md"
FILES = frozenset({CONFIG, WEIGHTS, RECORD, CARD})


@dataclass(frozen=True)
class Record:
    """What an adapter was made from, and what it reaches.

    Attributes:
        base_model: Hub id or folder of the model that it belongs to.
        revision: Of a hub id.
        fingerprint: Of that model's final norm and head (`spade_eval.fingerprint`).
        adapted: Hash of the weights that the adapter changes, see `spade_eval.adapters`.
        tasks: Whose training documents were used.
        documents: Their number.
        multi_token_documents: Of these, those whose answer has several tokens.
        validation_documents: That decided which adapter is kept.
        settings: Of the training.
        steps: Trained.
        best_step: The one whose adapter was kept.
        before: By task and for "all": mean accuracy on the validation documents, its standard
            error and their number n, without the adapter.
        after: With it.
        bill: Seconds, memory and the machine.
        command: That made it.
        versions: Of the packages.
    """

    base_model: str
    revision: str | None
    fingerprint: str
    adapted: str
    tasks: tuple[str, ...]
    documents: int
    multi_token_documents: int
    validation_documents: int
    settings: dict[str, Any]
    steps: int
    best_step: int
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    bill: dict[str, Any]
    command: str
    versions: dict[str, str]


def save(model: PeftModel, record: Record, folder: Path) -> None:
    """Write an adapter; the folder gets its name when it is complete.

    Raises:
        UserError: `folder` holds other files than an adapter's, or cannot be written.
    """
    # PEFT takes the folder that the model was loaded from, a cache of ours for the default model.
    model.peft_config["default"].base_model_name_or_path = record.base_model
    with replacing_folder(folder, "adapter", FILES.__contains__) as new:
        # Told to decide by itself, PEFT would ask the Hub whether to add the embeddings.
        model.save_pretrained(new, save_embedding_layers=False)
        write_json(new / RECORD, asdict(record))
        (new / CARD).write_text(card(record), encoding="utf-8")


def accuracies(record: Record) -> list[list[object]]:
    """Task, accuracy before and after with their standard errors, documents."""
    return [
        [task, _accuracy(record.before[task]), _accuracy(after), after["n"]]
        for task, after in record.after.items()
    ]


def _accuracy(entry: dict[str, Any]) -> str:
    stderr = "" if entry["stderr"] is None else f" ± {entry['stderr']:.3f}"
    return f"{entry['mean']:.3f}{stderr}"


def card(record: Record) -> str:
    """The model card of an adapter, Markdown with its YAML head."""
    head = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=hub_id(record.base_model),
        tags=["spade_eval", "lora", "lm-evaluation-harness"],
    )
    revision = f", revision {record.revision}" if record.revision else ""
    arguments = f"hf --model_args pretrained={record.base_model}"
    arguments += f",revision={record.revision}" if record.revision else ""
    if record.base_model == DEFAULT_MODEL_NAME:  # needs no pretrained=, which hf does
        arguments = "spade_layer --model_args layer=-1"
    facts: list[list[object]] = [
        ["base model", record.base_model + revision],
        ["fingerprint of its norm and head", record.fingerprint],
        ["tasks", ", ".join(record.tasks)],
        ["training documents", record.documents],
        ["of these with an answer of several tokens", record.multi_token_documents],
        ["validation documents", record.validation_documents],
        ["steps", record.steps],
        ["step of this adapter", record.best_step],
        *map(list, (record.settings | record.bill | record.versions).items()),
    ]
    return f"""---
{head.to_yaml()}
---

# LoRA adapter for {record.base_model}

Trained on the right answers of {", ".join(record.tasks)} (training splits, in the tasks' own
prompts, zero-shot); the loss is on the answer tokens alone. The step with the best accuracy on
validation documents was kept.

## Accuracy on validation documents

With its standard error. The documents chose the step, so the accuracy after is a little too good:
evaluate on other documents.

{table(["task", "before", "after", "documents"], accuracies(record))}

## Use

    spade-eval run --model {arguments},peft=ADAPTER \\
            --tasks {",".join(record.tasks)}

ADAPTER is this repository's id or a folder with its files. The models of spade_eval take the same
arguments.

## Training

{table(["", ""], facts)}

The command:

{chr(10).join("    " + line for line in record.command.splitlines())}
"""
