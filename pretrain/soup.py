"""Average the weights of several trainings from the same start: better than each of them, at the cost of one.

    python -m pretrain.soup runs/a runs/b runs/c --out runs/soup --validation data/flickr8k/val-000000.tar

A greedy soup (Wortsman et al. 2022, algorithm 1): from the run that is best on validation pairs on, each next one is
added to the average if that does not become worse. The runs must have begun from the same weights, projections to the
sphere included (`start.model`, see --start), or their average means nothing.

    python -m pretrain.soup --start CONFIG --out runs/start      # the first weights of a configuration, as a model
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cots.config import DataConfig, PretrainConfig, SourceConfig, read_config
from cots.data.square_transform import SquareTransform
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import model_directory
from pretrain.command import exit_code
from pretrain.start import starting_encoder, starting_tokenizer
from pretrain.validation import Metrics, Validation, criterion


def greedy_soup(runs: Sequence[Path], out: Path, validation: Sequence[str]) -> dict[str, Metrics]:
    """Write the soup of some runs' best models as a run of its own, and return its recalls.

    Raises:
        ModelError: a run holds no model, or they are of different architectures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [read_model(model_directory(str(run))) for run in runs]
    encoder, tokenizer, _ = models[0]
    image = encoder.config.image_tower
    transform = SquareTransform(image.image_size, image.resize)
    sources = [SourceConfig(path=path) for path in validation]
    measured = Validation(sources, tokenizer, transform, DataConfig().workers)
    encoder = encoder.to(device)

    def results(weights: dict[str, Tensor]) -> dict[str, Metrics]:
        encoder.load_state_dict(weights)
        return measured.measure(encoder, device)

    states = [{name: value.cpu().clone() for name, value in model.state_dict().items()} for model, _, _ in models]
    order = sorted(range(len(runs)), key=lambda index: -criterion(results(states[index])))
    chosen = order[:1]
    best = results(states[order[0]])
    print(f"{runs[order[0]]}: {_line(best)}")
    for index in order[1:]:
        candidate = results(_mean([states[one] for one in [*chosen, index]]))
        better = criterion(candidate) >= criterion(best)
        print(f"{'with' if better else 'not'} {runs[index]}: {_line(candidate)}")
        if better:
            chosen, best = [*chosen, index], candidate
    encoder.load_state_dict(_mean([states[one] for one in chosen]))
    save_model(out / "best", encoder.cpu(), tokenizer)
    shutil.copy(runs[order[0]] / "config.yaml", out / "config.yaml")
    return best


def save_start(config: PretrainConfig, out: Path) -> None:
    """Write the weights that a training begins with as a model directory, for `start.model`."""
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
    return "  ".join(
        f"{Path(path).name} {way.replace('_', ' ')} R@1 {metrics['R@1']:.1f}"
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
