"""Where the answer stands in the hidden states: principal components, and linear probes by layer.

The states are those of the last context position, where a one-token answer is read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from spade_eval.errors import UserError
from spade_eval.report.extra import needs_report_extra
from spade_eval.report.styles import Plot, curve_styles, legend_below, panels, plain
from spade_eval.report.sweeps import slug

with needs_report_extra():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from spade_eval.report.sweeps import Sweep

_SHOWN = 6  # layers in the figure of components
_FOLDS = 5
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST_NAME = 16  # characters of an answer in a legend


@dataclass(frozen=True)
class States:
    """Hidden states of one task.

    Attributes:
        states: h^0 .. h^L at the last context position, (L+1, N, d).
        labels: Number of the right answer, (N,).
        names: What each number answers; empty where this differs between documents.
    """

    states: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: dict[int, str] = field(default_factory=dict)

    def answers(self) -> list[str]:
        """The right answer of each document for a legend: its name, else a letter, A for 0."""
        labels = self.labels.tolist()
        if all(0 < len(self.names.get(label, "")) <= _LONGEST_NAME for label in labels):
            return [self.names[label] for label in labels]
        return [_LETTERS[n] if 0 <= n < len(_LETTERS) else str(n) for n in labels]


def read_states(path: Path) -> States:
    """Read states_TASK.safetensors.

    Raises:
        UserError: The file is damaged, or its tensors do not fit together.
    """
    try:
        with safe_open(path, "np") as file:
            states, labels = file.get_tensor("states"), file.get_tensor("labels")
            stored = json.loads((file.metadata() or {}).get("answers", "{}"))
            names = {int(number): str(name) for number, name in stored.items()}
    except (SafetensorError, OSError, ValueError, AttributeError) as err:
        raise UserError(
            f"{path} holds no readable `states` and `labels` ({type(err).__name__}: {err}). "
            "Run the sweep again, or move the file away."
        ) from err
    fit = states.ndim == 3 and len(states) > 1 and states.shape[2] > 1
    if not fit or labels.shape != states.shape[1:2] or labels.dtype.kind != "i":
        raise UserError(
            f"{path}: states {states.shape} and labels {labels.shape} of {labels.dtype} do not "
            "fit; (L+1, N, d) and (N,) of integers do. Run the sweep again, or move the file away."
        )
    # A state beyond float16's range was stored as infinity.
    finite = np.nan_to_num(states.astype(np.float32), posinf=65504, neginf=-65504)
    return States(finite, labels, names)


def space_figures(sweep: Sweep) -> Iterator[Plot]:
    """Components and probes of every task that the sweep kept states of (figure 2)."""
    for task, path in sweep.states.items():
        found = read_states(path)
        if len(found.labels) >= 2 and not (shown := components(found)).empty:
            yield _component_figure(sweep.model, task, shown)
        if not (probed := probe(found)).empty:
            yield _probe_figure(sweep.model, task, probed)


def components(found: States) -> pd.DataFrame:
    """The first two principal components of the states, at layers spread over those that vary.

    Returns:
        Columns layer, answer, pc1, pc2, and share, the part of the variance in both; empty if the
        states of no layer vary.
    """
    # Layer 0 may hold one and the same token throughout.
    varied = [layer for layer, states in enumerate(found.states) if np.ptp(states, axis=0).any()]
    if not varied:
        return pd.DataFrame()
    parts = []
    for i in np.unique(np.linspace(0, len(varied) - 1, _SHOWN).round().astype(int)):
        layer = varied[i]
        states = found.states[layer]
        pca = PCA(2, svd_solver="full")
        at = pca.fit_transform(states)
        share = float(pca.explained_variance_ratio_.sum())
        # The sign of a component is arbitrary: its largest loading is made positive.
        at *= np.sign(pca.components_[range(2), abs(pca.components_).argmax(1)])
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "answer": found.answers(),
                    "pc1": at[:, 0],
                    "pc2": at[:, 1],
                    "share": share,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def probe(found: States, seed: int = 0) -> pd.DataFrame:
    """Accuracy of a linear probe for the right answer at every layer, cross-validated.

    Logistic regression on standardised states; each document is predicted by a probe that has not
    seen it. Answers with fewer documents than folds are left out.

    Returns:
        Columns layer, accuracy, stderr, chance (share of the commonest answer), n; empty if fewer
        than two answers are left.
    """
    answers, counts = np.unique(found.labels, return_counts=True)
    kept = np.isin(found.labels, answers[counts >= _FOLDS])
    labels = found.labels[kept]
    n = len(labels)
    if len(np.unique(labels)) < 2:
        return pd.DataFrame()
    chance = np.unique(labels, return_counts=True)[1].max() / n
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    rows = []
    for layer, states in enumerate(found.states):
        # Threads that meet at every one of these small products take sixty times as long.
        with threadpool_limits(1):
            predicted = cross_val_predict(model, states[kept], labels, cv=folds)
        right = float(np.mean(predicted == labels))
        stderr = math.sqrt(right * (1 - right) / n)
        rows.append({"layer": layer, "accuracy": right, "stderr": stderr, "chance": chance, "n": n})
    return pd.DataFrame(rows)


def _component_figure(model: str, task: str, frame: pd.DataFrame) -> Plot:
    layers = sorted(frame["layer"].unique())
    styles = curve_styles({answer: answer for answer in sorted(frame["answer"].unique())})
    figure, axes = panels(len(layers), height=2.3)
    handles = {}
    for ax, layer in zip(axes, layers, strict=True):
        part = frame[frame["layer"] == layer]
        for answer, style in styles.items():
            dots = part[part["answer"] == answer]
            handles[answer] = ax.scatter(
                dots["pc1"], dots["pc2"], s=9, alpha=0.7, linewidths=0,
                color=style["color"], marker=style["marker"],
                rasterized=len(part) > 1000,  # a PDF of ten thousand vector dots opens slowly
            )  # fmt: skip
        ax.set_title(f"layer {layer}, {part['share'].iloc[0]:.0%} of variance")
        ax.set_xticks([])
        ax.set_yticks([])
    legend_below(figure, handles)
    return Plot(
        slug("components", model, task),
        f"{model}: hidden states of {plain(task)}, first two principal components",
        "Last context position; marks are the right answers"
        + (", A for the first choice." if set(frame["answer"]) <= set(_LETTERS) else "."),
        figure,
        frame,
    )


def _probe_figure(model: str, task: str, frame: pd.DataFrame) -> Plot:
    figure, (ax,) = panels(1, width=4.2, height=2.6)
    style = curve_styles({"probe": "probe"})["probe"]
    (line,) = ax.plot(frame["layer"], frame["accuracy"], **style)
    low, high = (frame["accuracy"] + sign * frame["stderr"] for sign in (-1, 1))
    ax.fill_between(frame["layer"], low, high, color=style["color"], alpha=0.15, linewidth=0)
    chance = ax.axhline(frame["chance"].iloc[0], color="black", linestyle=":", linewidth=1)
    ax.set_xlabel("layer")
    ax.set_ylabel("accuracy")
    ax.set_title(plain(task))
    legend_below(figure, {"linear probe": line, "commonest answer": chance})
    return Plot(
        slug("probe", model, task),
        f"{model}: linear probe for the right answer of {task}",
        f"Logistic regression, {_FOLDS}-fold cross-validation, {frame['n'].iloc[0]} documents.",
        figure,
        frame,
    )
