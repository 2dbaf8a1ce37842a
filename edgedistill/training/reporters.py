"""Experiment trackers that Trainer knows: are they installed, and where do they write?"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgedistill.errors import MissingTool

NAME = "edgedistill"
RUNS = "runs"  # beside the stages' folders; TensorBoard shows all runs below it


def require_reporters(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        MissingTool: names the first.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingTool(
                f"the package {name} is not installed, and distill.report_to names it",
                hint=f"pip install {name}, or take it out of distill.report_to",
            )


@contextlib.contextmanager
def reporting(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Within it, trackers that the user's environment does not direct write under the project name
    `edgedistill`, TensorBoard beside the stage's folder (which loses what is not its result)."""
    own = {
        "TENSORBOARD_LOGGING_DIR": str(folder.parent / RUNS / folder.name),
        "WANDB_PROJECT": NAME,
        "MLFLOW_EXPERIMENT_NAME": NAME,
    }
    added = [name for name in own if names and name not in os.environ]
    os.environ.update({name: own[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
