"""One experiment, one YAML file, one frozen and strict model: this is the only place where settings are declared.

A file names a preset, whose values are the defaults beneath its own; ``key=value`` overrides pass through the same
validation. Loading is safe by construction: no tags, no aliases, no duplicate keys, at most 1 MB. Unknown keys are
errors with a suggestion. There is no inheritance between files and no interpolation: `hedwig config show` prints
exactly what will run.
"""

from __future__ import annotations

from hedwig.config.loading import (
    ConfigError,
    json_schema,
    load_experiment,
    override,
    parse_yaml,
    validate_experiment,
)
from hedwig.config.matrix import Cell, Matrix, load_matrix
from hedwig.config.sections import (
    CaptionsConfig,
    DataConfig,
    EmbedConfig,
    EncoderConfig,
    EncoderFinetuneConfig,
    EncoderTrainingConfig,
    EvaluateConfig,
    Experiment,
    GeocellsConfig,
    IndexConfig,
    PolygonsConfig,
    RetrieveConfig,
    SlicingConfig,
    SplitConfig,
    SyntheticConfig,
    TrainingConfig,
)
from hedwig.config.services import ClusterConfig, ServeConfig, StorageConfig

__all__ = [
    "CaptionsConfig",
    "Cell",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EncoderFinetuneConfig",
    "EncoderTrainingConfig",
    "EvaluateConfig",
    "Experiment",
    "GeocellsConfig",
    "IndexConfig",
    "Matrix",
    "PolygonsConfig",
    "RetrieveConfig",
    "ServeConfig",
    "SlicingConfig",
    "SplitConfig",
    "StorageConfig",
    "SyntheticConfig",
    "TrainingConfig",
    "json_schema",
    "load_experiment",
    "load_matrix",
    "override",
    "parse_yaml",
    "validate_experiment",
]
