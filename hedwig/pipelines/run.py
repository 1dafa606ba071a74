"""A run: one experiment, its folder, and the rule that a stage whose artefact is there already has nothing to do.

Each stage says what it depends on: its settings and the manifests of its inputs. When the artefact on disk was made for
exactly these, the stage is skipped, and everything after it that depends on nothing else too. That is all there is to
resuming: there is no database, no state beside the artefacts.

A version that is published is not written to: a stage that would have to be made there raises `Protected`, and
`hedwig.pipelines.versions` then lets a new version grow beside it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from hedwig import storage
from hedwig.config import Experiment

__all__ = ["STAGE_FOLDERS", "Protected", "Run", "write_experiment"]

logger = logging.getLogger(__name__)

# Stage -> folder of its artefact in the run, in the order of the data.
STAGE_FOLDERS = {
    "synth": "world",
    "panoramas": "panoramas",
    "caption": "captions",
    "frames": "frames",
    "encoder": "encoder",
    "embed": "embeddings",
    "baseline": "baseline",
    "geocells": "geocells",
    "train": "geolocator",
    "index": "index",
    "predict": "predictions",
    "evaluate": "report",
}


class Protected(RuntimeError):
    """A stage of a published version is not up to date, and published versions are not written to."""


@dataclass
class Run:
    """One experiment being run.

    Attributes:
        experiment: the settings.
        progress: called with (stage, rows done, rows in all) while rows flow, and with the number of rejected rows
            where that is known.
        before_build: called before an artefact is made, and not when all is up to date: starts Ray.
        siblings: outputs of other runs; an artefact that one of them has made of the same is taken over from there.
        protected: raise `Protected` instead of writing anything.
        check_images: look whether images have changed since, though the listing has not: "stamps" compares their sizes
            and times, "contents" reads them all; None believes the listing.
        resumed: stages whose artefact was there already.
        made: stage -> seconds it took.
    """

    experiment: Experiment
    progress: Callable[..., None] | None = None
    before_build: Callable[[], None] | None = None
    siblings: Sequence[str] = ()
    protected: bool = False
    check_images: Literal["stamps", "contents"] | None = None
    resumed: list[str] = field(default_factory=list)
    made: dict[str, float] = field(default_factory=dict)

    def folder(self, stage: str) -> str:
        """Absolute path or URI of a stage's artefact."""
        return storage.join(storage.resolve(self.experiment.output), STAGE_FOLDERS[stage])

    def inputs(self, *stages: str) -> dict[str, str]:
        """Folder name -> manifest digest of the stages that something depends on.

        Raises:
            FileNotFoundError: one of them has no artefact yet.
        """
        for stage in stages:
            if storage.read_manifest(self.folder(stage)) is None:
                raise FileNotFoundError(
                    f"There is no finished {STAGE_FOLDERS[stage]} in {self.experiment.output}; run the stage {stage!r} "
                    f"first, e.g. hedwig run EXPERIMENT --until {stage}."
                )
        return {STAGE_FOLDERS[stage]: storage.manifest_digest(self.folder(stage)) for stage in stages}

    def finished(
        self, stage: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> storage.Manifest | None:
        """The stage's manifest, when it was made for these settings and inputs and its files are there."""
        manifest = storage.read_manifest(self.folder(stage))
        if manifest is None or manifest.fingerprint != storage.fingerprint(kind, config, inputs):
            return None
        missing = [name for name in manifest.files if not storage.exists(storage.join(self.folder(stage), name))]
        if missing:
            logger.warning("%s: %d files of its manifest are gone (%s); made anew", stage, len(missing), missing[0])
            return None
        return manifest

    def make(
        self,
        stage: str,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[], storage.Manifest],
        outdated: Callable[[str], bool] = lambda folder: False,
    ) -> storage.Manifest:
        """The stage's manifest: the one on disk if it is up to date, else what `build` returns.

        Args:
            stage: name of the stage.
            kind: of its artefact.
            config: settings that it depends on.
            inputs: name -> manifest digest of the artefacts that it depends on.
            build: makes it.
            outdated: whether what is in a folder is old although settings and inputs are the same.
        """
        config = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
        manifest = self.finished(stage, kind, config, inputs)
        if manifest is not None and not outdated(self.folder(stage)):
            self.resumed.append(stage)
            logger.info("%-9s up to date: %s", stage, _counts(manifest))
            return manifest
        self.check_writable(stage)
        manifest = self._taken_over(stage, kind, config, inputs, outdated)
        if manifest is not None:
            self.resumed.append(stage)
            logger.info("%-9s the same as in an earlier run: %s", stage, _counts(manifest))
            return manifest
        if self.before_build is not None:
            self.before_build()
        started = time.monotonic()
        manifest = build()
        self.made[stage] = time.monotonic() - started
        logger.info("%-9s done in %.1f s: %s", stage, self.made[stage], _counts(manifest))
        return manifest

    def check_writable(self, stage: str) -> None:
        """Raise Protected when this version is published."""
        if self.protected:
            raise Protected(f"{self.folder(stage)} would be made anew, and {self.experiment.output} is published.")

    def _taken_over(
        self,
        stage: str,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        outdated: Callable[[str], bool],
    ) -> storage.Manifest | None:
        """The artefact of a sibling that was made of the same settings and inputs, now here too."""
        for output in self.siblings:
            there = Run(self.experiment.model_copy(update={"output": output}))
            manifest = there.finished(stage, kind, config, inputs)
            if manifest is not None and not outdated(there.folder(stage)):
                storage.clone(there.folder(stage), self.folder(stage))
                return manifest
        return None

    def rows_progress(self, stage: str) -> Callable[..., None] | None:
        """The progress callback of `map_rows` for one stage."""
        call = self.progress
        return None if call is None else lambda *counts: call(stage, *counts)


def _counts(manifest: storage.Manifest) -> str:
    text = f"{manifest.num_out} of {manifest.num_in}"
    return text + (f", {manifest.num_rejected} rejected" if manifest.num_rejected else "")


def write_experiment(run: Run, stages: Sequence[str]) -> None:
    """Write the resolved experiment, as it runs, to ``experiment.yaml`` in the run folder."""
    settings = run.experiment.model_dump(mode="json")
    text = f"# The resolved experiment of the last `hedwig run` here; stages: {', '.join(stages)}.\n"
    path = storage.join(storage.resolve(run.experiment.output), "experiment.yaml")
    storage.write_bytes(path, (text + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)).encode())
