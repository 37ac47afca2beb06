"""cots pretrain --check CONFIG: look at everything that a training would read and need, before it takes hours.

Sources are opened and items of each decoded, captions counted in word pieces, training and validation compared, and a
step taken through the whole trainer. What would stop the run is a problem (exit code 1); what would make it worse than
it could be, or its numbers worth less, is a warning.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cots.config import PretrainConfig, SourceConfig
from cots.errors import ConfigError, CotsError, TrainingError
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.visual_tokenizer import load_visual_tokenizer
from pretrain.checkpoint import checkpoint_to_resume
from pretrain.epochs import Epochs
from pretrain.pair_sources import open_source
from pretrain.source_check import TINY, ItemFacts, Leak, SourceFacts, find_leaks, look_at
from pretrain.start import starting_tokenizer
from pretrain.trial import Trial, try_out
from pretrain.unusable import entries_left_out
from pretrain.validation import open_validation_source

_NAMED = 3  # examples of each finding
_ALL_PIECES = 1000  # word pieces after which a caption is not counted further


@dataclass
class CheckReport:
    """Attributes:
    problems: would stop the run. `warnings`: would not.
    steps: of the whole training; 0 if its sources are too small.
    """

    sources: list[SourceFacts] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    trial: Trial | None = None
    steps: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(config: PretrainConfig) -> None:
    """Examine a training and print what was found.

    Raises:
        TrainingError: something would stop the run.
    """
    console = Console(highlight=False, soft_wrap=False)
    with console.status("looking at the sources"):
        report = examine(config)
    _show(report, config, console)
    if report.problems:
        count = len(report.problems)
        raise TrainingError(f"{count} {'thing' if count == 1 else 'things'} would stop this run, listed above.")


def examine(config: PretrainConfig) -> CheckReport:
    """Everything that `check` prints."""
    report = CheckReport()
    output = Path(config.training.output)
    try:
        checkpoint_to_resume(output, config.training.resume)
    except ConfigError as error:
        report.problems.append(str(error))
    tokenizer = _uncut_tokenizer(config, report)
    _look_for_visual_tokenizer(config, report)
    _look_at_sources(config, tokenizer, report)
    _judge_sources(config, report)
    if not report.problems:
        logging.disable(logging.WARNING)  # libraries' remarks on the throwaway model
        try:
            report.trial = try_out(config)
        except (CotsError, RuntimeError, OSError) as error:
            report.problems.append(f"A step fails: {_first_line(error)}")
        finally:
            logging.disable(logging.NOTSET)
    if report.trial is not None:
        _judge_trial(config, report.trial, report)
    return report


def _uncut_tokenizer(config: PretrainConfig, report: CheckReport) -> CaptionTokenizer | None:
    text = config.model.text_tower.model_copy(update={"max_length": _ALL_PIECES})
    model = config.model.model_copy(update={"text_tower": text})
    try:
        return starting_tokenizer(config.model_copy(update={"model": model}))
    except CotsError as error:
        report.problems.append(str(error))
        return None


def _look_for_visual_tokenizer(config: PretrainConfig, report: CheckReport) -> None:
    masked = config.objective.masked_modeling
    try:
        if masked.image_weight:
            load_visual_tokenizer(masked.visual_tokenizer)
    except CotsError as error:
        report.problems.append(str(error))


def _look_at_sources(config: PretrainConfig, tokenizer: CaptionTokenizer | None, report: CheckReport) -> None:
    size = config.crop_size
    if not config.data.train:
        report.problems.append("data.train names no source; give at least one, such as data.train=pairs.tar.")
    if not config.data.validation:
        report.warnings.append(
            "data.validation names no source; nothing will tell when the model is best: the last one is kept."
        )
    roles = [("train", source) for source in config.data.train]
    roles += [("validation", source) for source in config.data.validation]
    for role, source in roles:
        try:
            pairs = open_validation_source(source) if role == "validation" else open_source(source)
        except CotsError as error:
            report.problems.append(_sentence(str(error)))
            continue
        report.sources.append(look_at(role, source, pairs, tokenizer, config.data, size))


def _judge_sources(config: PretrainConfig, report: CheckReport) -> None:
    train = [source for source in report.sources if source.role == "train"]
    validation = [source for source in report.sources if source.role == "validation"]
    if len(train) == len(config.data.train) > 0:
        _count_steps(config, config.data.train, train, report)
    for source in report.sources:
        _judge_items(config, source, report)
    report.leaks = find_leaks(train, validation)
    if report.leaks:
        same = sum(leak.identical for leak in report.leaks)
        kinds = [f"{same} identical"] * (same > 0)
        kinds += [f"{len(report.leaks) - same} near-identical"] * (same < len(report.leaks))
        shown = "; ".join(f"{_short(leak.validation)} = {_short(leak.train)}" for leak in report.leaks[:_NAMED])
        report.warnings.append(
            f"{_count(len(report.leaks), 'validation picture', 'validation pictures')} in the training sources too "
            f"({', '.join(kinds)}): recall on them says nothing. Leave them out of one side. {shown}."
        )


def _count_steps(
    config: PretrainConfig, settings: list[SourceConfig], train: list[SourceFacts], report: CheckReport
) -> None:
    training = config.training
    try:
        epochs = Epochs(
            [len(source.source) for source in train], [source.weight for source in settings], training.batch_size
        )
    except CotsError as error:
        report.problems.append(str(error))
        return
    report.steps = epochs.steps(training.epochs)
    captions = config.data.captions_per_item
    pairs, needed = report.steps * training.batch_size * captions, config.objective.noise_filter.queue_size
    if needed > pairs:
        report.warnings.append(
            f"objective.noise_filter begins once it has seen {needed:,} pairs, and the whole run has {pairs:,}; set a "
            "smaller queue_size."
        )
    queue, epoch = config.objective.contrastive.queue_size, epochs.samples * captions
    if queue > epoch:
        report.warnings.append(
            f"objective.contrastive.queue_size is {queue:,}, and an epoch has {epoch:,} pairs, which would be in the "
            "queue several times, as the towers of past epochs saw them; set a part of that, or 0 with "
            "contrastive.in_batch=online."
        )


def _judge_items(config: PretrainConfig, source: SourceFacts, report: CheckReport) -> None:
    broken, looked_at = source.broken, len(source.facts)
    if broken and source.role == "validation":
        report.problems.append(
            f"{source.path}: {len(broken)} of {looked_at} items cannot be used; a validation source must be whole, or "
            f"its recalls cannot be compared. {_examples(source, broken)}"
        )
    elif broken:
        allowed = config.data.max_bad_share
        text = f"{source.path}: {len(broken)} of {looked_at} items cannot be used. {_examples(source, broken)}"
        if source.stops(config.training.epochs, allowed):
            report.problems.append(f"{text} That is more than data.max_bad_share={allowed:g} allows.")
        else:
            report.warnings.append(f"{text} They will be skipped.")
    left_out = entries_left_out(source.source)
    if left_out:
        shown = "; ".join(f"{_short(error.path)}: {error.reason}" for error in left_out[:_NAMED])
        report.warnings.append(f"{source.path}: {_count(len(left_out), 'entry', 'entries')} left out. {shown}.")
    if source.tiny:
        report.warnings.append(
            f"{source.path}: in {len(source.tiny)} of {looked_at} pictures the shorter side is under {TINY} px. "
            f"{_examples(source, source.tiny)}"
        )
    if source.repeated:
        report.warnings.append(_tell_repeated(source))
    limit = config.model.text_tower.max_length
    long = source.over_long(limit)
    if long:
        longest = max(long, key=lambda fact: fact.longest)
        report.warnings.append(
            f"{source.path}: in {len(long)} of {looked_at} items a caption has more than {limit} word pieces; the "
            f"text tower will not see its end. The longest has {longest.longest} "
            f"({_short(source.name(longest.index))})."
        )


def _tell_repeated(source: SourceFacts) -> str:
    repeated = source.repeated
    items = sum(len(indices) for indices in repeated)
    pictures = "1 picture lies" if len(repeated) == 1 else f"{len(repeated)} pictures lie"
    harm = "its captions count as each other's negatives" if source.role == "train" else "only one of them can be found"
    example = " = ".join(_short(source.name(index)) for index in repeated[0][:2])
    return (
        f"{source.path}: {pictures} in {items} items, so that {harm}; make them one item with several captions. "
        f"For one, {example}."
    )


def _judge_trial(config: PretrainConfig, trial: Trial, report: CheckReport) -> None:
    needed = sum(trial.memory.values())
    if trial.device_memory is not None and needed > 0.95 * trial.device_memory:
        report.warnings.append(
            f"The training needs about {_gib(needed)}, and {_machine(trial)} has {_gib(trial.device_memory)}; raise "
            "training.accumulation, set training.activation_checkpointing=true, or train on several devices"
            + (f" with training.sharding=sharded ({_sharded(trial)})." if trial.sharded else ".")
        )
    kept = trial.checkpoint * (config.training.keep_checkpoints + 1)
    if kept > trial.disk:
        report.problems.append(
            f"The checkpoints need {_gib(kept)} and the disk of {config.training.output} has {_gib(trial.disk)} left; "
            "lower training.keep_checkpoints or choose another training.output."
        )


def _show(report: CheckReport, config: PretrainConfig, console: Console) -> None:
    if report.sources:
        console.print(_source_table(report, config))
    trial = report.trial
    if trial is not None:
        console.print()
        console.print(_trial_table(report, trial, config))
    console.print()
    findings = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for text in report.problems:
        findings.add_row(Text("problem", "bold red"), Text(text))
    for text in report.warnings:
        findings.add_row(Text("warning", "bold yellow"), Text(text))
    if not report.problems:
        findings.add_row(Text("ready", "bold green"), Text("Nothing found that would stop this run."))
    console.print(findings)


def _source_table(report: CheckReport, config: PretrainConfig) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("source", overflow="fold")
    for name in ("items", "decoded", "broken", "tiny", "twice", "too long"):
        table.add_column(name, justify="right")
    limit = config.model.text_tower.max_length
    for source in report.sources:
        twice = sum(len(indices) for indices in source.repeated)
        counts = [len(source.broken), len(source.tiny), twice, len(source.over_long(limit))]
        table.add_row(
            Text.assemble((f"{source.role} ", "dim"), source.path),
            f"{len(source.source):,}",
            f"{len(source.facts):,}",
            *(Text(f"{count:,}", style="yellow" if count else "dim") for count in counts),
        )
    return table


def _trial_table(report: CheckReport, trial: Trial, config: PretrainConfig) -> Table:
    """What one step said of the whole training."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    training = config.training
    table.add_row("one step", f"taken on {trial.device}, log and checkpoint written")
    table.add_row("training", f"{report.steps:,} steps of {training.batch_size} pairs")
    parts = [f"{name} {_gib(size)}" for name, size in trial.memory.items() if size >= 2**20]
    limit = f" of {_gib(trial.device_memory)}" if trial.device_memory else ""
    table.add_row("memory", f"about {_gib(sum(trial.memory.values()))}{limit} on one device: {', '.join(parts)}")
    if trial.sharded:
        table.add_row("sharded", f"about {_sharded(trial)} (training.sharding=sharded)")
    stepping = trial.pairs / trial.seconds
    decoding = _decoding_rate(report.sources)
    workers = max(1, config.data.workers)
    table.add_row(
        "rates", f"decoding {decoding:,.0f} items/s a worker, {workers} workers; steps {_rate(stepping)} pairs/s"
    )
    slower = stepping if config.data.cache_side else min(stepping, decoding * workers)
    hours = report.steps * training.batch_size / slower / 3600
    remark = "" if slower == stepping else "; decoding is the bottleneck: raise data.workers or set data.cache_side"
    compiled = ", not compiled" if training.compile else ""
    table.add_row("time", f"about {_duration(hours)} on one device at that rate{compiled}, validation aside{remark}")
    table.add_row("checkpoint", f"{_gib(trial.checkpoint)}; {_gib(trial.disk)} of the disk are free")
    return table


def _machine(trial: Trial) -> str:
    return "this machine" if trial.device == "CPU" else trial.device


def _sharded(trial: Trial) -> str:
    return ", ".join(f"{_gib(size)} on each of {gpus} GPUs" for gpus, size in trial.sharded.items())


def _decoding_rate(sources: list[SourceFacts]) -> float:
    """Items a second that one worker decodes and augments, of the training sources."""
    seconds = [fact.seconds for source in sources if source.role == "train" for fact in source.facts if fact.seconds]
    return len(seconds) / sum(seconds)


def _examples(source: SourceFacts, facts: list[ItemFacts]) -> str:
    named = [f"{_short(source.name(fact.index))}: {fact.broken or f'{fact.short_side} px'}" for fact in facts[:_NAMED]]
    return "; ".join(named) + ("; ..." if len(facts) > _NAMED else ".")


def _short(name: str) -> str:
    """An item's name without the folders that it lies in."""
    return Path(name).name


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one} is" if number == 1 else f"{number} {many} are"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _duration(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
