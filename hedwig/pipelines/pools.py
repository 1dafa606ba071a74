"""The actor pools of a row flow: one that does everything, or CPU workers that decode before the actors that embed.

One pool (``embed.decode=actor``) keeps frames inside a process and costs Ray the least; it is right where an actor's
own threads feed its model. Where they do not, ``apart`` puts reading and slicing into workers of one CPU each, which
Ray places on nodes without GPUs while there are any, and sends frames through the object store: whole panoramas never,
only uint8 frames. Two things must hold then, and are seen to here. Ray Data, which joins operators that ask for the
same, must not join these: the plan that runs is looked at before its first row. And frames in the store are bounded:
every block holds the frames of one call, so few rows that all the blocks that may be under way fit into
``embed.frames_budget_mb``, which Ray's own back-pressure is then told to keep. A block of one size whatever failed in
it is also what makes a decode worker that died send the same blocks again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hedwig.config import EmbedConfig
from hedwig.pipelines.chain import Step, frames_field, is_frames
from hedwig.pipelines.suspects import DecodeChain, GuardedChain

__all__ = ["Layout", "Pool", "lay_out", "split_steps", "watched_plan"]

# Blocks that a worker of either pool may have in the store: two that Ray lets it make ahead, one waiting, one in use.
BLOCKS_PER_WORKER = 4


@dataclass(frozen=True)
class Pool:
    """Actors that run the same steps.

    Attributes:
        name: for the plan.
        chain: what runs in an actor; Ray names its operator by it.
        steps: the stages.
        schema: what comes out, ``failure`` aside.
        batch_size: rows that are worked on together.
        read_ahead: batches whose images are fetched meanwhile.
        num_cpus: reserved by one actor.
        num_gpus: reserved by one actor; a fraction puts several on one GPU.
        least: actors that there always are.
        most: actors that there may be.
    """

    name: str
    chain: type[GuardedChain]
    steps: tuple[Step, ...]
    schema: pa.Schema
    batch_size: int
    num_cpus: float
    num_gpus: float
    least: int
    most: int
    read_ahead: int = 0

    def call_rows(self, block_rows: int) -> int:
        """Rows of a call: whole batches, and where it reads ahead as many as a block has; then Ray joins no blocks."""
        return self.batch_size * (max(1, block_rows // self.batch_size) if self.read_ahead else 1)

    @property
    def operator(self) -> str:
        """The name of its operator in Ray's plan."""
        return f"MapBatches({self.chain.__name__})"

    def text(self) -> str:
        """For a reader: ``decode [ImageReader, PanoramaSlicer] (2..4 actors of 1 CPU)``."""
        stages = ", ".join(step.stage.__name__ for step in self.steps)
        many = f"{self.least}..{self.most}" if self.most > self.least else f"{self.most}"
        each = f"{self.num_cpus:g} CPU" + (f", {self.num_gpus:g} GPU" if self.num_gpus else "")
        return f"{self.name} [{stages}] ({many} actor{'s' if self.most > 1 else ''} of {each})"


@dataclass(frozen=True)
class Layout:
    """The pools that rows go through, one after the other, and what may lie between them.

    Attributes:
        pools: in the order of the flow.
        block_bytes: of the frames of one block; None where no frames leave a process.
        budget_bytes: that Ray may have in its object store for this job; None for its own limit.
    """

    pools: tuple[Pool, ...]
    block_bytes: int | None = None
    budget_bytes: int | None = None

    @property
    def num_workers(self) -> int:
        """The most actors of all pools."""
        return sum(pool.most for pool in self.pools)

    def text(self) -> str:
        """One line for a reader."""
        line = " -> ".join(["read", *(pool.text() for pool in self.pools), "write"])
        if self.block_bytes is None or self.budget_bytes is None:
            return line
        rows = self.pools[0].batch_size
        return f"{line}; frames in blocks of {rows} rows, {self.budget_bytes / 1e6:.0f} MB of them at most"


def lay_out(
    kind: str, steps: Sequence[Step], schema: pa.Schema, source: pa.Schema, settings: EmbedConfig, num_rows: int
) -> Layout:
    """The pools that `settings` ask for.

    Args:
        kind: of the artefact.
        steps: all stages.
        schema: of the result.
        source: of the input.
        settings: the section.
        num_rows: of the input; a pool has no more actors than there are blocks to read.

    Raises:
        ValueError: the steps cannot be divided, or the frames of a few rows pass the budget.
    """
    most_useful = max(1, -(-num_rows // settings.rows_per_block))

    def actors(least: int, most: int | None) -> tuple[int, int]:
        top = min(most or least, most_useful)
        return min(least, top), top

    least, most = actors(settings.num_actors, settings.max_actors)
    makes_frames = any(map(is_frames, schema))  # too large for a call of many
    last = Pool(
        kind, GuardedChain, tuple(steps), schema, settings.batch_size, settings.num_cpus, settings.num_gpus, least,
        most, 0 if makes_frames else settings.read_ahead,
    )  # fmt: skip
    if settings.decode == "actor":
        return Layout((last,))
    decode, embed = split_steps(steps)
    slicing = decode[-1].arguments["slicing"]
    frames = frames_field(slicing.num_frames, slicing.frame_px)
    row_bytes, budget = frames.type.byte_width, settings.frames_budget_mb * 10**6
    least_first, most_first = actors(settings.decode_workers, settings.max_decode_workers)
    blocks = BLOCKS_PER_WORKER * (most_first + most)
    rows = min(settings.batch_size, budget // (blocks * row_bytes))
    if rows < 1:
        raise ValueError(
            f"embed.frames_budget_mb={settings.frames_budget_mb} is too little: {most_first} decode workers and {most} "
            f"actors have up to {blocks} blocks under way, and the frames of one row are {row_bytes / 1e6:.3g} MB. Set "
            f"it to {math.ceil(blocks * row_bytes / 10**6)} or more, or take fewer workers."
        )
    between = _between(decode, embed, schema, source, frames)
    first = Pool("decode", DecodeChain, tuple(decode), between, rows, 1.0, 0.0, least_first, most_first)
    last = Pool(
        "embed", GuardedChain, tuple(embed), schema, settings.batch_size, settings.num_cpus, settings.num_gpus, least,
        most,
    )  # fmt: skip
    return Layout((first, last), rows * row_bytes, budget)


def split_steps(steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """The steps up to the one that cuts frames, and those after it.

    Raises:
        ValueError: none cuts frames, or nothing comes after it.
    """
    for i, step in enumerate(steps[:-1], start=1):
        if "frames" in step.stage.writes and "slicing" in step.arguments:
            return list(steps[:i]), list(steps[i:])
    names = " -> ".join(step.stage.__name__ for step in steps)
    raise ValueError(
        f"embed.decode=apart needs a stage that cuts frames by a slicing and one after it that uses them; the stages "
        f"are {names}. Set embed.decode=actor."
    )


def _between(
    decode: Sequence[Step], embed: Sequence[Step], schema: pa.Schema, source: pa.Schema, frames: pa.Field
) -> pa.Schema:
    """The columns that go from one pool to the other: what the result keeps and what the second one reads."""
    made = {name for step in decode for name in step.stage.writes}
    later = {name for step in embed for name in step.stage.writes}
    read = {n for step in embed for n in (*step.stage.reads, *getattr(step.stage, "reads_if_there", ()))} - later
    fields = [frames]
    for name in dict.fromkeys(["pano_id", *schema.names, *sorted(read)]):
        if name == frames.name or name in later or not (name in made or name in source.names):
            continue
        known = schema if name in schema.names else source
        if name not in known.names:
            raise ValueError(f"embed.decode=apart knows no type of the column {name!r}. Set embed.decode=actor.")
        fields.append(known.field(name))
    return pa.schema(fields)


@contextmanager
def watched_plan(layout: Layout) -> Iterator[list[str]]:
    """Ray Data runs what is begun in the block as `layout` says, or not at all.

    It is told the most bytes that it may have in the object store and the size of a block, and each plan that has one
    of the pools is compared with the layout before it starts.

    Yields:
        A list that the names of the plan's operators are written into, in the order of the flow.
    """
    import ray
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    found: list[str] = []

    class Watch(ExecutionCallback):  # type: ignore[misc, unused-ignore]
        """Ray makes one for every plan that it executes; the plan of loading a checkpoint has no pool of ours."""

        def before_execution_starts(self, executor: Any) -> None:
            """Called with the operators in their final form."""
            names = [operator.name for operator in executor._topology]
            if any(pool.operator in name for pool in layout.pools for name in names):
                found[:] = names
                check_operators(names, layout)

    context = ray.data.DataContext.get_current()
    options, block, callbacks = (
        context.execution_options, context.target_max_block_size, context.custom_execution_callback_classes,
    )  # fmt: skip
    context.custom_execution_callback_classes = [*callbacks, Watch]
    if layout.budget_bytes is not None:
        from ray.data import ExecutionResources

        context.execution_options = copy.copy(options)
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=layout.budget_bytes
        )
        context.target_max_block_size = layout.block_bytes
    try:
        yield found
    finally:
        context.execution_options, context.target_max_block_size = options, block
        context.custom_execution_callback_classes = callbacks


def check_operators(names: Sequence[str], layout: Layout) -> None:
    """Raise RuntimeError unless each pool is in an operator of its own; Ray names joined ones with arrows between."""
    ours = {pool.operator for pool in layout.pools}
    if len([name for name in names if ours & set(name.split("->"))]) != len(ours):
        raise RuntimeError(
            f"Ray Data would run {', '.join(names)}: {' and '.join(sorted(ours))} are not operators of their own, so "
            "decoding would hold up the model. Set embed.decode=actor, and please report this with the version of Ray."
        )
