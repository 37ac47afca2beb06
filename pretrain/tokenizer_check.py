"""cots pretrain --check of a visual tokenizer: its sources looked at and one step taken, before the training."""

import io
import json
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from rich.console import Console

from cots.data.device_augmentation import DRAWS
from cots.errors import ConfigError, CotsError, TrainingError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.checkpoint import checkpoint_to_resume
from pretrain.determinism import deterministic_arithmetic
from pretrain.distributed import process_group
from pretrain.epochs import Epochs
from pretrain.pair_sources import open_source
from pretrain.source_check import SourceFacts, find_leaks, look_at
from pretrain.tokenizer_pictures import Squares
from pretrain.tokenizer_training import TokenizerRun
from pretrain.validation import open_validation_source

_PICTURES = 32  # of the trial step, at most
_NAMED = 3  # broken items of a source


def check_tokenizer_training(config: VisualTokenizerTrainingConfig) -> None:
    """Look at a tokenizer training's sources, take a step of it, and print what was found.

    Raises:
        ConfigError, TrainingError: something would stop the run.
    """
    console = Console(highlight=False, soft_wrap=True)
    problems: list[str] = []
    try:
        checkpoint_to_resume(Path(config.training.output), config.training.resume)
    except ConfigError as error:
        problems.append(str(error))
    sources = _look_at_sources(config, problems)
    for source in sources:
        console.print(f"{source.role} {source.path}: {len(source.source):,} items, {len(source.facts):,} decoded")
        _judge(source, config, problems, console)
    of_role = {role: [source for source in sources if source.role == role] for role in ("train", "validation")}
    leaks = find_leaks(of_role["train"], of_role["validation"])
    if leaks:
        console.print(f"warning: {len(leaks)} validation pictures are trained on too, for one {leaks[0].validation}.")
    if not config.data.validation:
        console.print("warning: data.validation names no source; no tokenizer will be chosen, or saved.")
    if not problems:
        try:
            console.print(_try_out(config, of_role["train"]))
        except (CotsError, RuntimeError, OSError) as error:
            problems.append(f"A step fails: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    for problem in problems:
        console.print(f"stops the run: {problem}")
    if problems:
        count = len(problems)
        raise TrainingError(f"{count} {'thing' if count == 1 else 'things'} would stop this run, listed above.")
    console.print("ready: nothing found that would stop this run")


def _look_at_sources(config: VisualTokenizerTrainingConfig, problems: list[str]) -> list[SourceFacts]:
    size = config.data.image_size or config.visual_tokenizer.image_size
    found: list[SourceFacts] = []
    if not config.data.train:
        problems.append("data.train names no source; add a path to train on.")
    for role, settings in (("train", config.data.train), ("validation", config.data.validation)):
        for source in settings:
            try:
                pairs = open_validation_source(source) if role == "validation" else open_source(source)
                found.append(look_at(role, source, pairs, None, config.data, size))
            except CotsError as error:
                problems.append(str(error))
    return found


def _judge(source: SourceFacts, config: VisualTokenizerTrainingConfig, problems: list[str], console: Console) -> None:
    broken, looked_at = source.broken, len(source.facts)
    if not broken:
        return
    named = "; ".join(f"{Path(source.name(fact.index)).name}: {fact.broken}" for fact in broken[:_NAMED])
    text = f"{source.path}: {len(broken)} of {looked_at} items cannot be read: {named}."
    if source.role == "train" and source.stops(config.training.epochs, config.data.max_bad_share):
        problems.append(f"{text} That is more than data.max_bad_share={config.data.max_bad_share:g} allows.")
    else:
        console.print(f"warning: {text}")


def _try_out(config: VisualTokenizerTrainingConfig, train: list[SourceFacts]) -> str:
    """One step through the whole trainer in a folder that is removed; what it says of the training."""
    training = config.training
    weights = [source.weight for source in config.data.train]
    steps = Epochs([len(each.source) for each in train], weights, training.batch_size).steps(training.epochs)
    changes = {
        "batch_size": min(training.batch_size, _PICTURES),
        "epochs": 1e-9,
        "log_every": 1,
        "compile": False,
        "resume": False,
        "tensorboard": False,
        "wandb": "",
        "trace_step": 0,
    }
    # no cache: it would decode the whole collection
    data = config.data.model_copy(update={"workers": 0, "validation": [], "cache_side": None})
    with tempfile.TemporaryDirectory(prefix="cots-check-") as directory, redirect_stderr(io.StringIO()):
        small = training.model_copy(update={**changes, "output": directory})
        with deterministic_arithmetic(training.deterministic), process_group(training.device) as ranks:
            run = TokenizerRun(config.model_copy(update={"training": small, "data": data}), ranks)
            try:
                run.train()
                seconds = _seconds_per_step(run)
            finally:
                run.telemetry.close()
        loss = json.loads((Path(directory) / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]
    rate = small.batch_size / seconds
    minutes = steps * training.batch_size / rate / 60
    duration = "less than a minute" if minutes < 1 else f"about {minutes:,.0f} min or less"
    return (
        f"one step of {small.batch_size} pictures done on {run.device.type}, loss {loss:.3f}, {rate:,.0f} pictures/s: "
        f"{steps:,} steps of {training.batch_size} take {duration}, decoding aside"
    )


def _seconds_per_step(run: TokenizerRun) -> float:
    """Of a second step, on grey pictures: the first one also starts the device."""
    count = run.config.training.batch_size
    squares = Squares(
        torch.full((count, 3, run.side, run.side), 128, dtype=torch.uint8, device=run.device),
        torch.full((count, DRAWS), 0.5, device=run.device),
        [],
        [],
    )
    started = time.perf_counter()
    run.take_step(squares)["loss"].item()  # waits for the device
    return time.perf_counter() - started
