"""The whole product on one screen: the stages of an experiment in order, each skipped when its artefact is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

from hedwig import storage
from hedwig.config import Experiment, load_experiment
from hedwig.pipelines.checks import check_captions, check_encoders
from hedwig.pipelines.cluster import ray_running, use_storage
from hedwig.pipelines.report import report
from hedwig.pipelines.run import STAGE_FOLDERS, Run
from hedwig.pipelines.stages import STAGES
from hedwig.pipelines.versions import run_stages
from hedwig.pipelines.world import synth
from hedwig.schema import suggestion

__all__ = ["plan", "run_experiment", "run_job"]

logger = logging.getLogger(__name__)
_ALL = {"synth": synth, **STAGES, "evaluate": report}


def plan(experiment: Experiment, first: str | None = None, last: str | None = None) -> list[str]:
    """The stages that this experiment needs, in order, from `first` to `last`, both included.

    Raises:
        FileNotFoundError: weights that these stages need are not there.
        ValueError: no such stage, or one that this experiment does not have; or encoder or caption settings that
            cannot work.
    """
    x = experiment
    absent = {
        "synth": x.data.panoramas is not None or x.data.synthetic is None,
        "frames": not x.encoder.is_trained,
        "encoder": not x.encoder.is_trained,
        "baseline": x.evaluate.baseline is None,
    }
    stages = [name for name in STAGE_FOLDERS if not absent.get(name, False)]
    for name in (first, last):
        if name is not None and name not in stages:
            hint = suggestion(name, stages)
            raise ValueError(f"This experiment has no stage {name!r}; it has {', '.join(stages)}.{hint}")
    begin = stages.index(first) if first else 0
    end = stages.index(last) + 1 if last else len(stages)
    if begin >= end:
        raise ValueError(f"--from {first} comes after --until {last}; the order is {', '.join(stages)}.")
    check_encoders(x, stages[begin:end])
    check_captions(x, stages[begin:end])
    return stages[begin:end]


def run_job(arguments: Sequence[str], stage: str | None = None) -> None:
    """What the scripts in ray_jobs/ do: run an experiment, or one stage of it, on the cluster the job was sent to.

    Args:
        arguments: the experiment file, then ``key=value`` overrides.
        stage: the only stage to run; None for all.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit("usage: EXPERIMENT [KEY=VALUE]...")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_experiment(load_experiment(arguments[0], ["cluster.address=auto", *arguments[1:]]), first=stage, last=stage)


def run_experiment(
    experiment: Experiment,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
    progress: Callable[..., None] | None = None,
    siblings: Sequence[str] = (),
    check_images: Literal["stamps", "contents"] | None = None,
) -> Run:
    """Run the stages of an experiment; what is up to date is not done again, and what is published not written to.

    Args:
        experiment: the settings.
        first: first stage, such as 'embed'; earlier ones must be there.
        last: last stage.
        force: delete the artefacts of these stages first.
        progress: called with (stage, rows done, rows in all), and with the number of rejected rows where it is known.
        siblings: outputs of other runs whose artefacts may be taken over where they are the same.
        check_images: "stamps" or "contents": look for images that have changed although the listing has not.

    Raises:
        TooManyRejected: more rows failed than ``data.max_rejected`` allows.
        FileNotFoundError: the listing, or the artefact of an earlier stage, is not there.
        ValueError: settings and data do not fit together.
    """
    use_storage(experiment.storage.model_dump())
    stages = plan(experiment, first, last)

    def go(run: Run, names: Sequence[str]) -> None:
        with ExitStack() as stack:

            def start_ray() -> None:
                run.before_build = None
                stack.enter_context(ray_running(experiment.cluster))

            run.before_build = start_ray
            for name in names:
                _ALL[name](run)

    run = run_stages(
        experiment,
        stages,
        go,
        force=force,
        siblings=[storage.resolve(output) for output in siblings],
        progress=progress,
        check_images=check_images,
    )
    if run.resumed:
        again = f", {len(run.made)} made" if run.made else ": nothing to do"
        logger.info("resumed: %d of %d stages were up to date%s", len(run.resumed), len(stages), again)
    return run
