"""The sections of an experiment, but for those of `hedwig.config.services`, with type, bounds and default of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hedwig.config.services import ClusterConfig, Section, ServeConfig, StorageConfig

__all__ = [
    "CaptionsConfig",
    "DataConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EncoderFinetuneConfig",
    "EncoderTrainingConfig",
    "EvaluateConfig",
    "Experiment",
    "GeocellsConfig",
    "IndexConfig",
    "PolygonsConfig",
    "RetrieveConfig",
    "SlicingConfig",
    "SplitConfig",
    "SyntheticConfig",
    "TrainingConfig",
]


class SyntheticConfig(Section):
    """Render a synthetic world first and use it as the listing."""

    num: int = Field(gt=0, description="number of panoramas")
    width: int = Field(default=1024, ge=64, description="width in px; the height is half of it")
    seed: int = Field(default=0, ge=0, description="seed of the world")
    countries: tuple[str, ...] = Field(default=(), description="ISO 3166-1 alpha-2 codes; none: the whole Earth")


class SplitConfig(Section):
    """How panoramas with a position are divided; 'column' takes the listing's own split column."""

    method: Literal["spatial", "random", "column"] = "spatial"
    block_km: float = Field(default=200.0, gt=0, description="side of a spatial block")
    buffer_km: float = Field(default=1.0, ge=0, description="training rows this near to a held-out row are set aside")
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must leave something to train on (< 1)")
        return self


class DataConfig(Section):
    """The panorama listing."""

    panoramas: str | None = Field(default=None, description="Parquet, CSV or GeoParquet listing; local, s3:// or gs://")
    synthetic: SyntheticConfig | None = None
    layout: Literal["panoramas", "bearings"] = Field(
        default="panoramas",
        description="'bearings': one row per heading, rows of one pano_id are one panorama",
    )
    image_root: str | None = Field(
        default=None, description="what relative image_uri start from; default: the listing's folder"
    )
    max_rejected: float = Field(default=0.05, ge=0, description="below 1 a share of the rows, from 1 a count")
    split: SplitConfig = SplitConfig()


class SlicingConfig(Section):
    """How a panorama becomes frames; the frame side in pixels is the encoder's."""

    mode: Literal["paper", "wrap", "perspective", "bearings"] = "wrap"
    num_frames: int = Field(default=8, ge=1, le=64, description="frames given to the encoder")
    select: Literal["uniform", "middle", "first"] = "uniform"
    height_px: int = Field(default=640, ge=16)
    stride_px: int = Field(default=200, ge=1)
    fov_deg: float = Field(default=90.0, gt=0, lt=180)
    pitch_deg: float = Field(default=0.0, ge=-90, le=90)
    headings_deg: tuple[float, ...] | None = None
    band_deg: float = Field(default=112.5, gt=0, le=180, description="vertical field kept of an equirectangular image")
    align_north: bool = True
    half_size: bool = Field(default=False, description="half-size DCT decode: faster, not faithful")


class CaptionsConfig(Section):
    """Where captions come from; keys are read from the environment and never from here."""

    source: Literal["template", "none", "openai", "openai-batch", "transformers", "vllm"] = "template"
    prompt: Literal["basic", "verbose", "two-step"] = "basic"
    token_budget: int | None = Field(
        default=None,
        ge=5,
        le=75,
        description="longest caption; default: what the encoder reads (30 for ViCLIP, 75 for CLIP), and not cut at all "
        "for prompt=verbose or encoder.long_captions=chunks",
    )
    model: str | None = Field(default=None, description="name at the endpoint, or the local folder of a model")
    revision: str | None = Field(default=None, description="part of the key under which answers are kept")
    base_url: str | None = Field(default=None, description="OpenAI-compatible endpoint, ending in /v1")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="environment variable that holds the key")
    max_frames: int = Field(default=8, ge=1, description="frames shown to the model, chosen evenly")
    frame_px: int = Field(default=448, ge=64, description="side of a frame shown to the model")
    images: Literal["frames", "sheet"] = Field(default="frames", description="one image per frame, or one of them all")
    detail: Literal["low", "high", "auto"] = "low"
    leaks: Literal["report", "mask", "reject"] = Field(default="report", description="place names found in a caption")
    answers: str | None = Field(default=None, description="folder of kept answers; default: answers/ in the run")
    concurrency: int = Field(default=16, ge=1, description="requests under way in one actor")
    per_second: float | None = Field(default=None, gt=0, description="most requests a second in one actor")
    timeout_s: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=6, ge=1)
    poll_s: float = Field(default=60.0, gt=0, description="openai-batch: seconds between two looks at the batches")
    batch_requests: int = Field(default=50_000, ge=1, le=50_000, description="openai-batch: most requests in a batch")
    batch_megabytes: int = Field(
        default=200, ge=1, le=200, description="openai-batch: largest batch; smaller where a tier takes fewer tokens"
    )
    usd_per_million_input: float | None = Field(
        default=None, ge=0, description="None: cost is not stated; for openai-batch the batch's price"
    )
    usd_per_million_output: float | None = Field(default=None, ge=0)
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="transformers only")
    route: Literal["messages", "prompt"] = Field(
        default="messages", description="vllm only; 'prompt' for InternVL chat models without a template"
    )
    accelerator: str | None = Field(default=None, description="vllm only: Ray's name of the GPU")

    @model_validator(mode="after")
    def _names_a_model(self) -> CaptionsConfig:
        if self.source not in ("template", "none") and self.model is None:
            raise ValueError(f"captions.source={self.source} needs captions.model")
        if self.source.startswith("openai") and self.base_url is None:
            raise ValueError(f"captions.source={self.source} needs captions.base_url, which ends in /v1")
        return self


class EncoderTrainingConfig(Section):
    """Train a tiny encoder from scratch on this experiment's own training split, before embedding."""

    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    num_cells: int = Field(default=64, ge=2)
    tau_km: float = Field(default=500.0, gt=0)
    text_weight: float = Field(default=0.1, ge=0)
    hidden_patches: float = Field(default=0.5, ge=0, lt=1, description="share of patches left out of a training step")
    roll_probability: float = Field(default=0.5, ge=0, le=1, description="share of panoramas whose frames are rotated")
    brightness: float = Field(default=0.1, ge=0, lt=1, description="brightness jitter")
    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    seed: int = Field(default=0, ge=0)


class EncoderFinetuneConfig(Section):
    """Fine-tune the encoder's given weights on this experiment's own training split, before embedding."""

    blocks: int | None = Field(
        default=None, ge=1, description="the last blocks of the vision tower learn, with its projection; or lora_rank"
    )
    lora_rank: int | None = Field(default=None, ge=1, description="adapters of this rank on all blocks learn")
    lora_alpha: float | None = Field(default=None, gt=0, description="their scale times the rank; default: the rank")
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, description="default: 1e-5, or 1e-4 with lora_rank")
    head_learning_rate: float = Field(default=1e-3, gt=0, description="of the classifier that is thrown away")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    num_cells: int = Field(default=64, ge=2)
    tau_km: float = Field(default=500.0, gt=0)
    text_weight: float = Field(default=0.0, ge=0, description="of the contrastive loss with captions")
    hidden_patches: float = Field(default=0.0, ge=0, lt=1, description="share of patches left out of a training step")
    roll_probability: float = Field(default=0.5, ge=0, le=1, description="share of panoramas whose frames are rotated")
    brightness: float = Field(default=0.1, ge=0, lt=1, description="brightness jitter")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")
    bf16: bool = Field(default=True, description="GPU only")
    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1, description="go on with fewer workers, down to this many")
    cpus_per_worker: int = Field(default=1, ge=1)
    use_gpu: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _says_what_learns(self) -> EncoderFinetuneConfig:
        if (self.blocks is None) == (self.lora_rank is None):
            raise ValueError("encoder.finetune needs either blocks or lora_rank, and not both")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("encoder.finetune.lora_alpha needs lora_rank")
        return self


class EncoderConfig(Section):
    """The video-text encoder; without weights they are random, and every report says so."""

    name: str = Field(
        default="viclip-l14", description="viclip-*, clip-*, open_clip:ARCH, timm:ARCH or transformers:LABEL"
    )
    weights: str | None = Field(
        default=None, description="a file, a folder with model.safetensors, or a name that `hedwig fetch` knows"
    )
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="what the weights file must have")
    seed: int = Field(default=0, ge=0, description="seed of random weights")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fusion: Literal["auto", "viclip", "mean", "max_sim", "attention"] = Field(
        default="auto", description="frames to one vector; auto: joint attention for ViCLIP, the mean for the rest"
    )
    temporal: Literal["select", "interpolate"] = Field(
        default="select", description="frames other than ViCLIP's eight: choose eight, or stretch its time embedding"
    )
    long_captions: Literal["truncate", "chunks"] = "truncate"
    quick_gelu: bool | None = Field(
        default=None, description="open_clip only: the weights were trained with QuickGELU, where no file tells"
    )
    compile: bool = False
    train: EncoderTrainingConfig | None = None
    finetune: EncoderFinetuneConfig | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a run makes the weights itself, from scratch or from those given."""
        return self.train is not None or self.finetune is not None

    @model_validator(mode="after")
    def _is_trained_one_way(self) -> EncoderConfig:
        if self.train is not None and self.finetune is not None:
            raise ValueError(
                "encoder.train makes weights from scratch and encoder.finetune starts from those given; set one of them"
            )
        return self


class EmbedConfig(Section):
    """The actor pool that slices and embeds, and the workers that slice before it where `decode` is apart."""

    decode: Literal["actor", "apart"] = Field(
        default="actor", description="apart: CPU workers read and slice, and the actors only embed"
    )
    decode_workers: int = Field(default=1, ge=1, description="apart: least workers, of one CPU each")
    max_decode_workers: int | None = Field(default=None, ge=1, description="apart: most; default: no autoscaling")
    frames_budget_mb: int = Field(default=1024, ge=1, description="apart: most frames in Ray's object store at once")
    num_actors: int = Field(default=1, ge=1, description="least actors")
    max_actors: int | None = Field(default=None, ge=1, description="most actors; default: no autoscaling")
    num_cpus: float = Field(default=1.0, gt=0, description="CPUs reserved by one actor")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs reserved by one actor")
    num_threads: int = Field(default=2, ge=1, description="decoding and torch threads of one actor")
    batch_size: int = Field(default=32, ge=1)
    read_ahead: int = Field(
        default=2,
        ge=0,
        description="batches whose images are fetched while one is embedded; 0: none",
    )
    rows_per_block: int = Field(default=256, ge=1, description="unit of work, of progress and of what a crash repeats")
    batch_timeout_s: float | None = Field(
        default=None, gt=0, description="a batch, or a row tried alone, that takes longer ends its worker; None: never"
    )


class PolygonsConfig(Section):
    """Administrative polygons to use instead of the offline default geography."""

    admin0: str
    admin1: str | tuple[str, ...] | None = None
    admin2: str | tuple[str, ...] | None = None
    country_column: str | None = Field(default=None, description="ISO codes; default: those of the known data sets")
    admin1_column: str | None = None
    admin2_column: str | None = None


class GeocellsConfig(Section):
    """How the Earth is partitioned."""

    method: Literal["admin", "kmeans", "quadtree", "quadtree-adaptive", "h3"] = "admin"
    min_panoramas: int = Field(default=30, ge=1)
    max_panoramas: int = Field(default=60, ge=1)
    num_cells: int | None = Field(default=None, ge=1, description="kmeans only; default: from the bounds")
    depth: int = Field(default=10, ge=1, le=30, description="quadtree only: most divisions")
    levels: int = Field(default=3, ge=2, le=4, description="of the hierarchy, the cells included")
    polygons: PolygonsConfig | None = None
    seed: int = Field(default=0, ge=0)


class TrainingConfig(Section):
    """Projection and geocell classifier."""

    use_text: bool = Field(
        default=True, description="concatenate the caption's embedding (paper) or use the image alone"
    )
    projection_dim: int = Field(default=768, ge=1)
    hidden_dim: int = Field(default=0, ge=0, description="0: one linear projection, as in the paper")
    cosine: bool = Field(default=False, description="cosine logits with a learned scale")
    loss: Literal["ce", "mse", "haversine", "haversine_raw"] = "haversine"
    tau_km: float = Field(default=75.0, gt=0)
    hierarchy_weights: tuple[float, ...] = Field(
        default=(), description="cross entropy of the coarser levels, coarsest first; none: the cells alone"
    )
    contrastive_weight: float = Field(default=0.0, ge=0, description="panoramas near each other are to look alike")
    near_km: float = Field(default=25.0, gt=0)
    far_km: float = Field(default=200.0, gt=0)
    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    patience: int = Field(default=10, ge=1, description="epochs without a better validation loss before stopping")
    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1, description="go on with fewer workers, down to this many")
    cpus_per_worker: int = Field(default=1, ge=1)
    use_gpu: bool = False
    bf16: bool = Field(default=False, description="GPU only")
    seed: int = Field(default=0, ge=0)


class IndexConfig(Section):
    """What the retriever searches, and what validation rows teach it."""

    embedding: Literal["projected", "image", "whitened"] = "projected"
    codec: Literal["fp16", "fp32", "sq8", "pq"] = "fp16"
    whiten_dim: int | None = Field(default=None, ge=1, description="dimensions kept by whitening; default: all")
    whiten_shrinkage: float | None = Field(default=None, ge=0, le=1, description="default: Ledoit-Wolf")
    prototype_min_samples: int = Field(default=3, ge=2, description="OPTICS, for retrieve.refine=prototype")
    prototype_xi: float = Field(default=0.15, gt=0, lt=1)
    tune: bool = Field(default=False, description="choose what retrieve leaves open by half of the validation rows")
    tune_for: Literal["geoscore", "median"] = "geoscore"
    confidence_km: float = Field(default=200.0, gt=0, description="confidence: the answer is within this distance")


class RetrieveConfig(Section):
    """Cell, then neighbour."""

    num_cells: int = Field(default=5, ge=1)
    cell_mass: float | None = Field(
        default=None, gt=0, le=1, description="smallest set of cells with this posterior mass, at most num_cells"
    )
    num_neighbours: int = Field(default=5, ge=1)
    log_prob_weight: float | None = Field(
        default=None, ge=0, description="score = cosine / T + this x log p(cell); None: tuned, or 0 without tuning"
    )
    score_temperature: float | None = Field(default=None, gt=0, description="T; None: tuned, or 1 without tuning")
    refine: Literal["neighbour", "cell", "mean", "prototype"] = "neighbour"
    mean_within_km: float = Field(default=1000.0, gt=0, description="refine=mean: neighbours this near to the best")
    prototype_temperature: float = Field(default=1.6, gt=0)
    abstain_below: float | None = Field(default=None, ge=0, le=1, description="less confident answers are marked")
    regions: bool = Field(default=False, description="list the cells of the 50 % and 90 % regions")


class EvaluateConfig(Section):
    """Scores, intervals and floors."""

    num_bootstrap: int = Field(default=1000, ge=10)
    baseline: EncoderConfig | None = Field(default=None, description="the mean-pooled CLIP to compare with")
    seed: int = Field(default=0, ge=0)


class Experiment(Section):
    """Everything one run needs to know."""

    name: str = Field(default="experiment", min_length=1)
    preset: Literal["paper", "paper-fixed", "pigeon", "hedwig"] = "hedwig"
    output: str = Field(min_length=1, description="run folder; local, s3:// or gs://")
    data: DataConfig = DataConfig()
    slicing: SlicingConfig = SlicingConfig()
    captions: CaptionsConfig = CaptionsConfig()
    encoder: EncoderConfig = EncoderConfig()
    embed: EmbedConfig = EmbedConfig()
    geocells: GeocellsConfig = GeocellsConfig()
    training: TrainingConfig = TrainingConfig()
    index: IndexConfig = IndexConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
