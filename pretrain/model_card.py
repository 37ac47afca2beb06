"""The card that is saved beside a model: what it is, what it was trained on, how good it is."""

from collections.abc import Mapping, Sequence

from cots.config import PretrainConfig
from cots.model.open_clip_architecture import OPEN_CLIP


def model_card(
    config: PretrainConfig,
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    notes: str = "",
    *,
    averaged: Sequence[str] = (),
    centering: float | None = None,
) -> str:
    """Markdown from the configuration and its validation results.

    Args:
        config: of the training; of a soup that of its best run, with the training sources of all of them.
        results: {source: {direction: metrics}}.
        notes: put at the end.
        averaged: the runs that a soup is the average of, the best first.
        centering: the share of the training pairs' means that embeddings are shifted by, of a released model.
    """
    image, text = config.model.image_tower, config.model.text_tower
    blocks = f", {image.transformer_depth} transformer blocks of width {image.transformer_width}"
    given = config.start
    start = given.model or f"image {given.image_tower or 'random'}, text {given.text_tower or 'random'}"
    temporal = config.model.temporal
    clips = "the mean of the frames' embeddings" + (
        f", and a transformer of {temporal.depth} layers over them" if temporal.kind == "transformer" else ""
    )
    lines = [
        "# A COTS dual encoder",
        "",
        f"- Image tower: {image.name} at {image.image_size} px ({image.resize})"
        + ("" if image.name.startswith(OPEN_CLIP) else f", pooled by {image.pooling}")
        + (blocks if image.transformer_depth else ""),
        f"- Text tower: {text.name}, at most {text.max_length} word pieces"
        if text.name.startswith(OPEN_CLIP)
        else f"- Text tower: BERT of {text.layers} layers, {text.width} wide, at most {text.max_length} word pieces, "
        f"pooled by {text.pooling}",
        f"- Embedding: {config.model.embedding_dim} dimensions, unit norm",
        f"- Clips: {clips}",
        f"- Started from: {start}",
        *([_weights(averaged)] if averaged else []),
        f"- Trained on: {', '.join(f'{source.path} (x{source.weight:g})' for source in config.data.train)}",
        f"- {'The best of these trainings: at' if len(averaged) > 1 else 'At'} most {config.training.epochs:g} epochs, "
        f"batch {config.training.batch_size}, seed {config.training.seed}",
    ]
    if centering is not None:
        lines.append(f"- Centred: embeddings are shifted by {centering:g} times the training pairs' means")
    lines.append("")
    if results:
        lines += ["| validation | direction | R@1 | R@5 | R@10 | MedR |", "|---|---|---|---|---|---|"]
    else:
        lines += ["Not validated: the weights are those that the training ended with."]
    for path, directions in results.items():
        for direction, m in directions.items():
            figures = f"{m['R@1']:.1f} | {m['R@5']:.1f} | {m['R@10']:.1f} | {m['MedR']:g}"
            lines.append(f"| {path} | {direction.replace('_', ' ')} | {figures} |")
    return "\n".join(lines) + "\n" + (f"\n{notes.strip()}\n" if notes else "")


def _weights(averaged: Sequence[str]) -> str:
    if len(averaged) == 1:
        return f"- Weights: those of the training {averaged[0]}, which an average with others did not better"
    return f"- Weights: the average of {len(averaged)} trainings ({', '.join(averaged)})"
