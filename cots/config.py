"""Every setting of a training, documented where it stands, validated once; those of the model are in model_config.py.

A configuration is a YAML file read by `read_config`, with dotted overrides from the command line on top:

    cots pretrain configs/cots_mini.yaml optimizer.learning_rate=1e-4 training.epochs=5

An unknown key is an error that names the nearest known one. Paths in a YAML file are relative to the working
directory; environment variables are expanded, and `~` at the beginning of a value (see settings.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cots.model_config import ModelConfig, Positive
from cots.settings import Settings, read_values, validate_config

Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
TEMPERATURES = (0.01, 0.5)


class StartConfig(Settings):
    """Where the first weights come from. Nothing set: random initialisation."""

    image_tower: str | None = None
    """`timm` for its pretrained weights (needs a network), or a .safetensors file of the timm architecture."""
    text_tower: str | None = None
    """A directory with a BERT `model.safetensors` (Hugging Face layout)."""
    model: str | None = None
    """A COTS model directory or `embedded`, or `open_clip:ARCH/TAG` for the towers of an open_clip model (TAG may be a
    checkpoint file). The shapes of `model` must be its own, but for the image size."""


class SourceConfig(Settings):
    path: str
    """Webdataset .tar shards (a glob for several) or a table with a path and a captions column."""
    weight: float = Field(1.0, gt=0)
    """How often each of its pairs is seen in an epoch; the fraction is drawn anew each epoch."""


def _as_sources(value: Any) -> Any:
    """A path stands for a source, and one source for a list of it."""
    listed = value if isinstance(value, list) else [value]
    for each in listed:
        if not isinstance(each, (str, dict, SourceConfig)):
            raise ValueError(f"{each!r} is not a source; give a path, or {{path: ..., weight: ...}}")
    return [{"path": each} if isinstance(each, str) else each for each in listed]


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources)]


class AugmentationConfig(Settings):
    crop_scale: tuple[Share, Share] = (0.6, 1.0)
    """Area share of a random crop."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333)
    """Range of a random crop's aspect, width / height."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirror image; captions that say `left` or `right` keep theirs unmirrored."""
    color: float = Field(0.2, ge=0)
    """Strength of the jitter of brightness, contrast and saturation (hue: a quarter of it)."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability of a grey picture."""
    rand_augment: int = Field(0, ge=0, le=4)
    """Number of RandAugment operations, at most 4 (0: none)."""
    rand_augment_magnitude: int = Field(7, ge=0, le=30)
    """Strength of these operations, from 0 to 30 (Cubuk et al. 2020): at 30 a rotation is one of 30 degrees."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability that one random rectangle is erased."""
    drop_words: float = Field(0.0, ge=0, lt=1)
    """Probability that a caption's word is left out; not with `cache_side`, which keeps no words."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "AugmentationConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} [{low:g}, {high:g}] is a range; give the smaller number first")
        return self


class DataConfig(Settings):
    train: Sources = []
    """Sources of the pairs to train on, at least one, each a path or a path with its weight; an epoch mixes them."""
    validation: Sources = []
    """Pairs on which checkpoints are chosen. Never a test split: reported numbers would no longer mean anything."""
    image_size: int | None = Field(None, ge=16)
    """Side in pixels of the random crops; by default the tower's. A convolutional tower gains from a smaller one:
    random crops show things larger than a whole picture does at the same size (Touvron et al. 2019, FixRes)."""
    captions_per_item: int = Field(1, ge=1)
    """Captions drawn for an item each time it is seen."""
    frames_per_item: int = Field(1, ge=1)
    """Frames drawn from a clip, one in each of as many equal segments, their embeddings pooled. A picture is one
    frame."""
    cache_side: int | None = Field(None, ge=16)
    """Decode every picture once, squashed to a square of this side and kept in memory as uint8, and cut the crops on
    the device: for collections of some ten thousand pictures, where decoding would be the bottleneck. Augmentation
    then differs: RandAugment turns, shears and shifts only, crops are scaled without antialiasing, and `crop_ratio` is
    a crop's aspect in the square, not in the picture."""
    augmentation: AugmentationConfig = AugmentationConfig()
    workers: int = Field(2, ge=0)
    """Decoding processes per rank; threads where pictures are decoded once (`cache_side`, validation)."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """The run stops when more than this share of the samples could not be read; fewer than 1,000 count as 1,000."""


class ContrastiveConfig(Settings):
    weight: float = Field(1.0, ge=0)
    """0: not computed."""
    queue_size: int = Field(12_800, ge=0)
    """Momentum features kept per modality as negatives; 0: only those of the batch."""
    in_batch: Literal["none", "momentum", "online"] = "none"
    """Negatives from the other pairs of the global batch besides the queue's: none (as in the paper); their momentum
    features; or their online features, through which gradients then flow. Online features are compared among
    themselves, apart from the queue's, and the two losses averaged (see cots/objectives/retrieval.py)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the negatives; the positive keeps the rest."""

    @model_validator(mode="after")
    def _has_negatives(self) -> "ContrastiveConfig":
        if self.weight and self.in_batch == "none" and not self.queue_size:
            raise ValueError("without negatives there is nothing to learn; set in_batch=online or a queue_size")
        return self


class MaskedModelingConfig(Settings):
    """Token level: hidden patches and words told from the rest and from the partner's global embedding."""

    image_weight: float = Field(0.0, ge=0)
    """Weight of predicting the visual tokens of hidden patches; 0: not computed."""
    text_weight: float = Field(0.0, ge=0)
    """Weight of predicting hidden word pieces; 0: not computed."""
    image_share: float = Field(0.4, gt=0, lt=1)
    """Share of a picture's patches that is hidden, in blocks (BEiT, Bao et al. 2022)."""
    text_share: float = Field(0.15, gt=0, lt=1)
    """Share of a caption's word pieces to be predicted (BERT, Devlin et al. 2019)."""
    visual_tokenizer: str = "embedded"
    """The discrete VAE that names the patches: `embedded`, or a directory that training one wrote."""
    stored_tokens: bool = False
    """Take the names from the shards, where `python -m pretrain.tokenize` put them, in place of computing them from
    what the tower is shown. Pictures are then seen whole (data.augmentation.crop_scale=[1, 1])."""


class TaskAlignmentConfig(Settings):
    """Task level: image-to-text and text-to-image retrieval distributions pulled together."""

    weight: float = Field(0.0, ge=0)
    """0: not computed."""
    gradient: Literal["both", "prediction"] = "prediction"
    """Which side of each KL divergence learns. `prediction`: the target is a constant, so that each direction is
    taught by the other one; `both`: the target moves too, which the two can also use to become equally vague."""
    target: Literal["online", "momentum"] = "online"
    """Whose distributions are the targets. `online`: the other direction's. `momentum`: of both directions the mean of
    the two as the momentum towers see them, which also says what else a caption fits (soft targets, as in ALBEF, Li et
    al. 2021)."""

    @model_validator(mode="after")
    def _momentum_has_no_gradient(self) -> "TaskAlignmentConfig":
        if self.target == "momentum" and self.gradient == "both":
            raise ValueError("momentum targets do not learn; leave gradient at prediction")
        return self


LEAST_MIXTURE = 1000  # similarities; of 512 that are of one hill, one draw in 250 looks like two


class NoiseFilterConfig(Settings):
    """Pairs whose momentum similarity is unusually low contribute no contrastive and no alignment loss."""

    queue_size: int = Field(0, ge=0)
    """Similarities of past pairs from which the threshold is computed; 0: no filter."""
    rule: Literal["deviations", "mixture"] = "deviations"
    """What is unusually low. `deviations`, as in the paper: so far below the mean, by which some pairs are left out of
    any training. `mixture`: of the lower one of two hills, with odds of nine to one, if it is the smaller one and lies
    where captions of other pictures lie, and the higher one does not; where there is no such hill, every pair
    teaches."""
    deviations: float = Field(1.0)
    """With `rule: deviations` the threshold lies this many standard deviations below the mean."""
    start: float = Field(0.1, ge=0, le=1)
    """Share of the steps after which the filter begins: before, the similarities say little."""

    @model_validator(mode="after")
    def _applies(self) -> "NoiseFilterConfig":
        if self.rule == "mixture" and 0 < self.queue_size < LEAST_MIXTURE:
            raise ValueError(
                f"rule=mixture finds two hills in any few similarities; set queue_size to {LEAST_MIXTURE} or more, or "
                "rule=deviations"
            )
        if self.rule == "mixture" and self.deviations != type(self).model_fields["deviations"].default:
            raise ValueError("deviations has no effect with rule=mixture; set rule=deviations, or leave it out")
        return self


class ObjectiveConfig(Settings):
    temperature: float = Field(0.05, ge=1e-3)
    """What similarities, in [-1, 1], are divided by before the softmax: a lower one looks at the nearest negatives
    alone."""
    learn_temperature: bool = False
    """Train the temperature, started at `temperature` and kept in [0.01, 0.5] (`TEMPERATURES`)."""
    momentum: float = Field(0.99, ge=0, le=1)
    """Decay of the momentum towers' exponential moving average, per step."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    masked_modeling: MaskedModelingConfig = MaskedModelingConfig()
    task_alignment: TaskAlignmentConfig = TaskAlignmentConfig()
    noise_filter: NoiseFilterConfig = NoiseFilterConfig()

    @model_validator(mode="after")
    def _has_a_loss(self) -> "ObjectiveConfig":
        masked = self.masked_modeling
        if not (self.contrastive.weight or self.task_alignment.weight or masked.image_weight or masked.text_weight):
            raise ValueError("every loss has weight 0; there is nothing to learn")
        return self

    @model_validator(mode="after")
    def _has_something_to_align(self) -> "ObjectiveConfig":
        if self.task_alignment.weight and self.contrastive.in_batch == "none" and not self.contrastive.queue_size:
            raise ValueError(
                "task_alignment has but one candidate for each pair and nothing to align; set "
                "contrastive.in_batch=online or a contrastive.queue_size"
            )
        return self

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> "ObjectiveConfig":
        low, high = TEMPERATURES
        if self.learn_temperature and not low <= self.temperature <= high:
            raise ValueError(
                f"temperature {self.temperature:g} lies outside of [{low}, {high}], in which a learned one is kept; "
                "start it within"
            )
        return self


class OptimizerConfig(Settings):
    learning_rate: float = Field(1e-4, gt=0)
    """Peak rate of everything that no other rate is given for."""
    image_tower_rate: float | None = Field(None, ge=0)
    """Peak rate of the image tower; by default `learning_rate`. 0 freezes it (LiT, Zhai et al. 2022)."""
    text_tower_rate: float | None = Field(None, ge=0)
    """Peak rate of the text tower, likewise."""
    image_layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer of the image tower learns at this share of the rate of the one above it."""
    text_layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer of the text tower, likewise."""
    weight_decay: float = Field(0.05, ge=0)
    """Of AdamW, on matrices and kernels; biases, norms and single numbers have none. A step takes this share of the
    weights, times the rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decays per step of AdamW's averages of the gradient and of its square."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the latter. CLIP was trained with 1e-6."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradient norm is clipped here; 0: not."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After a linear warm-up: half a cosine down to `final_rate`, or constant with a linear cooldown over
    `cooldown`."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps."""
    cooldown: float = Field(0.2, ge=0, le=1)
    """Share of the steps (constant schedule)."""
    final_rate: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate at the end."""

    @model_validator(mode="after")
    def _cools_after_warming(self) -> "OptimizerConfig":
        if self.schedule == "constant" and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup {self.warmup:g} and cooldown {self.cooldown:g} are together more than the whole training"
            )
        return self


class TrainingConfig(Settings):
    output: str = "runs/cots"
    """Directory of the run: checkpoints, log.jsonl, and the best model under best/."""
    epochs: float = Field(10, gt=0)
    """Passes over the samples (each counted by its source's weight)."""
    batch_size: int = Field(512, ge=2)
    """Pairs per step over all ranks."""
    resume: bool = False
    """Go on from the output directory's last checkpoint, if there is one."""
    seed: int = Field(0, ge=0, lt=2**63)
    """All that is drawn is drawn from it: first weights, the order of the samples, augmentation, masks, dropout."""
    device: str = "auto"
    """`auto`: cuda if there is one, else cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the towers; `auto`: bf16 on cuda. Losses are always computed in fp32."""
    compile: bool = False
    """torch.compile the towers."""
    accumulation: int = Field(1, ge=1)
    """Parts in which a rank's batch goes through the towers, for want of memory. The loss is still that of the whole
    batch, with all its negatives (gradient caching, Gao et al. 2021), at the price of a second forward pass."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the towers' layers and compute the rest again in the backward pass."""
    sharding: Literal["replicated", "sharded"] = "replicated"
    """How several ranks hold the weights: a copy each (DDP), or a part each (FSDP2)."""
    log_every: int = Field(10, ge=1)
    """Steps between two rows of the log."""
    validate_every: int = Field(1, ge=0)
    """Epochs between two validations; 0: only at the end."""
    validate_steps: int = Field(0, ge=0)
    """Steps between two further validations; 0: none."""
    checkpoint_every: int = Field(1, ge=1)
    """Epochs between two checkpoints of the whole training state."""
    checkpoint_steps: int = Field(0, ge=0)
    """Steps between two further checkpoints; 0: none."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many recent checkpoints are kept in the output directory."""
    averaging: float = Field(0.0, ge=0, lt=1)
    """Decay per step of a slow average of the weights that is validated and saved in place of them; 0: none. It begins
    as the weights that the training starts from, which still carry weight in runs of fewer than 3 / (1 - averaging)
    steps."""
    averaging_start: float = Field(0.0, ge=0, lt=1)
    """Share of the steps after which that average begins."""
    weights_dtype: Literal["float32", "float16", "int8"] = "float32"
    """How the best model's weights are stored; int8: matrices by row with float16 scales, the rest float16."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, under tensorboard/ (pip install tensorboard)."""
    wandb: str = ""
    """Log to this Weights & Biases project too (pip install wandb)."""
    deterministic: bool = False
    """Steps that come out the same to the bit each time on one device, on a GPU too, so that a run that goes on equals
    one that was never stopped; slower. On a CPU they do without it."""
    trace_step: int = Field(0, ge=0)
    """First of three steps that torch's profiler traces into trace.json.gz; 0: none. Choose one after the first few,
    which compile and warm up."""


class PretrainConfig(Settings):
    model: ModelConfig = ModelConfig()
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def crop_size(self) -> int:
        """Side in pixels of the pictures that a training shows: `data.image_size`, by default the image tower's."""
        return self.data.image_size or self.model.image_tower.image_size


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML training configuration and put `key.key=value` overrides (values in YAML syntax) on top.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override has no `=`, or a key or value is not valid.
    """
    return validate_config(PretrainConfig, read_values(path, overrides), str(path))
