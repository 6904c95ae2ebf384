"""The table of `--log_samples`: a line per cell and request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spade_eval.sweep import table

if TYPE_CHECKING:
    import pandas as pd

    from spade_eval.sweep.collected import Collected
    from spade_eval.sweep.lm import SweepLM


def samples_of(lm: SweepLM, name: str, task: Any, collected: Collected) -> pd.DataFrame:
    """Each cell's log-likelihood of each request, and whether it is greedy.

    Log-likelihoods of a text's windows are added up; a text is greedy if all its windows are.

    Args:
        lm: The model that was swept.
        name: The task's name.
        task: lm-eval's task.
        collected: What the pass over it has left.
    """
    import pandas as pd

    found = []
    cells = table.cells(lm.grid, task.OUTPUT_TYPE == "loglikelihood_rolling")
    for call in collected.calls:
        if not call.instances:  # this process had none, or empty texts alone
            continue
        at: dict[int, int] = {}
        of = np.array([at.setdefault(id(i), len(at)) for i in call.instances], dtype=np.int64)
        one = np.unique(of, return_index=True)[1]
        rolling = call.instances[0].request_type == "loglikelihood_rolling"
        keys = pd.DataFrame(
            {
                "task": name,
                "doc_id": [call.instances[i].doc_id for i in one],
                "request": [call.instances[i].idx for i in one],
            }
        )
        for columns, cell in cells:
            values = call.logprobs[cell]
            each = np.bincount(of, values) if rolling else values[one]
            greedy = np.bincount(of, ~call.greedy[cell]) == 0
            own = {"loglikelihood": each, "is_greedy": greedy}
            names = ("decoder", "lens_data", "layer", "threshold", "confidence", "exit_scope",
                     "readout")  # fmt: skip
            found.append(keys.assign(**{n: columns.get(n) for n in names}, **own))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
