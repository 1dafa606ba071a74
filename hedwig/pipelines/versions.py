"""Where an experiment's stages are made: in its run folder, or in a version that grows beside the published one.

Before anything is published, that is the run folder itself. Afterwards the published version is looked at first: where
all stages are up to date there is nothing to do; at the first that is not, the work moves to the growing version, which
takes over what is the same and computes the rest. The same command after a kill finds the same growing version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hedwig import storage
from hedwig.config import Experiment
from hedwig.pipelines.run import STAGE_FOLDERS, Protected, Run, write_experiment
from hedwig.publishing import growing_version, published_folder, read_pointer, version_folder

__all__ = ["run_stages"]

logger = logging.getLogger(__name__)


def run_stages(
    experiment: Experiment,
    stages: Sequence[str],
    go: Callable[[Run, Sequence[str]], None],
    *,
    force: bool = False,
    siblings: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Let `go` bring the stages up to date, in the folder where they may be written.

    Args:
        experiment: the settings; its output is the run folder.
        stages: to run, in order.
        go: runs the stages of a `Run`.
        force: make them anew.
        siblings: run folders whose artefacts may be taken over where they are the same.
        options: the rest of `Run`.
    """
    output = storage.resolve(experiment.output)
    if read_pointer(output) is None:
        run = Run(experiment, siblings=siblings, **options)
    else:
        current = published_folder(output)
        if not force:
            run = Run(_inside(experiment, output, current), protected=True, **options)
            try:
                go(run, stages)
            except Protected as why:
                logger.info("%s", why)
            else:
                return run
        folder = version_folder(output, growing_version(output))
        logger.info("a new version grows in %s; `hedwig publish %s` publishes it", folder, experiment.output)
        others = siblings if force else [current, *siblings]
        run = Run(_inside(experiment, output, folder), siblings=others, **options)
        _adopt_earlier_stages(run, current, stages)
    write_experiment(run, stages)
    if force:
        for name in stages:
            storage.delete(run.folder(name))
    go(run, stages)
    return run


def _inside(experiment: Experiment, output: str, folder: str) -> Experiment:
    """The experiment as it runs in one version; answers that were paid for are shared by all."""
    answers = experiment.captions.answers or storage.join(output, "answers", "captions")
    captions = experiment.captions.model_copy(update={"answers": answers})
    return experiment.model_copy(update={"output": folder, "captions": captions})


def _adopt_earlier_stages(run: Run, current: str, stages: Sequence[str]) -> None:
    """What comes before the first stage is asked of nobody, so it is taken from the published version as it is."""
    published = Run(run.experiment.model_copy(update={"output": current}))
    order = list(STAGE_FOLDERS)
    for name in order[: order.index(stages[0])]:
        if storage.read_manifest(run.folder(name)) is None and storage.read_manifest(published.folder(name)):
            storage.clone(published.folder(name), run.folder(name))
