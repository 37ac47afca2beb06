"""Average the weights of several trainings from the same start: better than each of them, at the cost of one.

    python -m pretrain.soup runs/a runs/b runs/c --out runs/soup --validation data/flickr8k/val-000000.tar

A greedy soup (Wortsman et al. 2022, algorithm 1): from the run that is best on validation pairs on, each next one is
added to the average if that does not become worse. The runs must have begun from the same weights, projections to the
sphere included (`start.model`, see --start), or their average means nothing: runs whose settings say otherwise are
named. soup.json and the model's card say what was averaged, and what that was trained on.

    python -m pretrain.soup --start CONFIG --out runs/start      # the first weights of a configuration, as a model
"""

import argparse
import copy
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cots.config import DataConfig, PretrainConfig, SourceConfig, read_config
from cots.data.square_transform import SquareTransform
from cots.errors import ConfigError, ModelError
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import SavedModel, open_saved_model, save_model
from cots.model.pretrained import model_directory
from cots.settings import Settings, validate_config
from pretrain.command import exit_code
from pretrain.model_card import model_card
from pretrain.run_log import short_names
from pretrain.start import starting_encoder, starting_tokenizer
from pretrain.validation import Metrics, Validation, criterion

RECORD = "soup.json"
_FAR_APART = "the average of models from different starts is usually worse than each (give them one start.model)."
_RUN = ("config.yaml", "log.jsonl", "checkpoints", "best", RECORD)
_ONLY_IN_TRAINING = ("drop_path", "dropout", "freeze_norms")  # they leave no trace in what a model computes
log = logging.getLogger("cots")


class SoupRecord(Settings):
    """What a soup is the average of, as its run directory keeps it in soup.json."""

    fingerprint: str
    """Of the model in best/."""
    trainings: dict[str, list[SourceConfig]]
    """The training sources of each run that was averaged, the best run first."""

    @property
    def sources(self) -> list[SourceConfig]:
        """The training sources of all runs, each once for every weight that it had."""
        sources = [source for each in self.trainings.values() for source in each]
        return [source for place, source in enumerate(sources) if source not in sources[:place]]


def read_record(run: Path) -> SoupRecord | None:
    """What a run's best model is the average of; None if it comes from one training, or from a soup without a record.

    Raises:
        ConfigError: the record is damaged.
        ModelError: the run holds no model, or a damaged one.
    """
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); make the soup again.") from error
    record = validate_config(SoupRecord, values, str(path))
    of_this_model = record.fingerprint == open_saved_model(model_directory(str(run))).fingerprint
    return record if of_this_model else None  # a training may have replaced the model since


def holds_run(directory: Path) -> bool:
    """Whether a training or a soup was written into a directory."""
    return any((directory / name).exists() for name in _RUN)


def greedy_soup(runs: Sequence[Path], out: Path, validation: Sequence[str]) -> dict[str, Metrics]:
    """Write the soup of some runs' best models as a run of its own, and return its recalls.

    The run has a record of what was averaged (soup.json) and the config.yaml of the best of the runs.

    Raises:
        ModelError: a run holds no model, or they are of different architectures or tokenizers.
        ConfigError: `out` holds a run or a model already, a run is given twice or has no config.yaml, or a validation
            source is named like a test split.
        SourceError, MediaError: a validation source is not whole.
    """
    _refuse_written(out)
    encoders, tokenizer = _read_encoders(runs)
    trainings = [_trainings(run) for run in runs]
    _name_other_starts(runs)
    image = encoders[0].config.image_tower
    transform = SquareTransform(image.image_size, image.resize)
    sources = [SourceConfig(path=path) for path in validation]
    measured = Validation(sources, tokenizer, transform, DataConfig().workers)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out.") from error
    chosen, weights, results = _choose(runs, encoders, measured)

    encoder = encoders[chosen[0]]
    encoder.load_state_dict(weights)
    averaged = {name: given for index in chosen for name, given in trainings[index].items()}
    record = SoupRecord(fingerprint="", trainings=averaged)
    config = read_config(runs[chosen[0]] / "config.yaml")
    data = config.data.model_copy(update={"train": record.sources})
    card = model_card(config.model_copy(update={"data": data}), results, averaged=tuple(averaged))
    fingerprint = save_model(out / "best", encoder, tokenizer, card=card)
    shutil.copyfile(runs[chosen[0]] / "config.yaml", out / "config.yaml")
    record = record.model_copy(update={"fingerprint": fingerprint})
    (out / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return results


def _refuse_written(out: Path) -> None:
    if holds_run(out):
        raise ConfigError(f"{out} holds a run already; choose another --out.")
    if (out / "config.json").exists() or out.is_file():
        raise ConfigError(f"{out} {'is a file' if out.is_file() else 'holds a model'} already; choose another --out.")


def _read_encoders(runs: Sequence[Path]) -> tuple[list[DualEncoder], CaptionTokenizer]:
    """The runs' encoders and the tokenizer that they share, none of them built before all are found to be alike."""
    places = [run.resolve() for run in runs]
    for index, run in enumerate(runs):
        if places[index] in places[:index]:
            raise ConfigError(f"The run {run} is given twice; name each run once.")
    saved = [open_saved_model(model_directory(str(run))) for run in runs]
    for run, model in zip(runs[1:], saved[1:]):
        _refuse_other_model(run, model, runs[0], saved[0])
    return [model.encoder() for model in saved], saved[0].tokenizer


def _refuse_other_model(run: Path, model: SavedModel, first_run: Path, first: SavedModel) -> None:
    settings, expected = (dict(_leaves(one.config.model_dump(), "model")) for one in (model, first))
    for name in expected | settings:
        value, other = settings.get(name, "not set"), expected.get(name, "not set")
        if value != other and name.rpartition(".")[2] not in _ONLY_IN_TRAINING:
            raise ModelError(
                f"{run} has {name} {value}, {first_run} {other}; only runs of one architecture can be averaged."
            )
    if _words(model.tokenizer) != _words(first.tokenizer):
        raise ModelError(
            f"{run} has another tokenizer than {first_run}; only runs with the same word pieces can be averaged."
        )


def _name_other_starts(runs: Sequence[Path]) -> None:
    """Warn of runs that, by their settings, did not begin with the weights of the first one."""
    first = read_config(runs[0] / "config.yaml")
    for run in runs[1:]:
        config = read_config(run / "config.yaml")
        if config.start != first.start:
            log.warning("%s began with %s, %s with %s; %s", run, _start(config), runs[0], _start(first), _FAR_APART)
        elif not config.start.model and config.training.seed != first.training.seed:
            log.warning("%s and %s drew what they began with from different seeds; %s", run, runs[0], _FAR_APART)


def _start(config: PretrainConfig) -> str:
    named = config.start.model_dump(exclude_none=True)
    return ", ".join(f"start.{name}={value}" for name, value in named.items()) or "random weights"


def _leaves(settings: Mapping[str, Any], parent: str) -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{parent}.{key}")
        elif value != {}:
            yield f"{parent}.{key}", value


def _words(tokenizer: CaptionTokenizer) -> list[Any]:
    """How a caption becomes word pieces. A vocab.txt and a tokenizer.json say in different words where [CLS] goes."""
    content = json.loads(tokenizer.to_json())
    return [content[part] for part in ("normalizer", "pre_tokenizer", "model")]


def _trainings(run: Path) -> dict[str, list[SourceConfig]]:
    """The training sources of a run, or of each run that a soup is the average of."""
    record = read_record(run)
    return record.trainings if record else {str(run): read_config(run / "config.yaml").data.train}


def _choose(
    runs: Sequence[Path], encoders: Sequence[DualEncoder], measured: Validation
) -> tuple[list[int], dict[str, Tensor], dict[str, Metrics]]:
    """Which runs make the greedy soup, the best first, its weights and its recalls."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = copy.deepcopy(encoders[0]).to(device)

    def measure(weights: dict[str, Tensor]) -> dict[str, Metrics]:
        encoder.load_state_dict(weights)
        return measured.measure(encoder, device)

    states = [one.state_dict() for one in encoders]
    alone = [measure(state) for state in states]
    order = sorted(range(len(runs)), key=lambda index: -criterion(alone[index]))
    chosen, weights, best = order[:1], states[order[0]], alone[order[0]]
    print(f"{runs[order[0]]}: {_line(best)}")
    for index in order[1:]:
        mean = _mean([states[one] for one in [*chosen, index]])
        candidate = measure(mean)
        better = criterion(candidate) >= criterion(best)
        print(f"{'with' if better else 'not'} {runs[index]}: {_line(candidate)}")
        if better:
            chosen, weights, best = [*chosen, index], mean, candidate
    return chosen, weights, best


def save_start(config: PretrainConfig, out: Path) -> None:
    """Write the weights that a training begins with as a model directory, for `start.model`.

    Raises:
        ConfigError: `out` holds a run, or the settings do not fit together.
        ModelError: weights to start from are missing or of another architecture.
    """
    if holds_run(out):
        raise ConfigError(f"{out} holds a run already; choose another --out.")
    torch.manual_seed(config.training.seed)
    tokenizer = starting_tokenizer(config)
    save_model(out, starting_encoder(config, tokenizer), tokenizer)


def _mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    first = states[0]
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in first.items()
    }


def _line(results: dict[str, Metrics]) -> str:
    names = short_names(results)
    return "  ".join(
        f"{names[path]} {way.replace('_', ' ')} R@1 {metrics['R@1']:.1f}"
        for path, ways in results.items()
        for way, metrics in ways.items()
    )


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", nargs="*", default=[], help="captioned sources, none used for training")
    parser.add_argument("--start", metavar="CONFIG", help="only write the first weights of this configuration")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings to change in CONFIG")
    arguments = parser.parse_args()
    if not arguments.start and not (arguments.runs and arguments.validation):
        parser.error("give runs and --validation, or --start")
    if arguments.start:
        save_start(read_config(arguments.start, arguments.set), arguments.out)
    else:
        greedy_soup(arguments.runs, arguments.out, arguments.validation)


if __name__ == "__main__":
    sys.exit(exit_code(main))
