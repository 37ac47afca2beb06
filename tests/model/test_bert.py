import pytest
import torch
from transformers import BertConfig, BertModel

from cots.model.bert import PAD, Bert

SHAPE = {"width": 32, "layers": 2, "heads": 4, "intermediate": 64, "positions": 20}


def _reference(dropout: float = 0.0) -> BertModel:
    config = BertConfig(
        vocab_size=50,
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["intermediate"],
        max_position_embeddings=SHAPE["positions"],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=PAD,
    )
    return BertModel(config, add_pooling_layer=False)


@pytest.fixture
def captions() -> torch.Tensor:
    """Random ids of random lengths, padded to 12."""
    token_ids = torch.randint(1, 50, (5, 12))
    lengths = torch.randint(1, 13, (5, 1))
    return token_ids.where(torch.arange(12) < lengths, PAD)


def test_outputs_and_gradients_are_those_of_transformers_bert(captions: torch.Tensor) -> None:
    reference = _reference().train()
    for parameter in reference.parameters():  # biases and norms too, which start at constants
        torch.nn.init.normal_(parameter, std=0.2)
    ours = Bert(50, dropout=0.0, **SHAPE).train()
    ours.load_state_dict(reference.state_dict())
    expected = reference(input_ids=captions, attention_mask=captions != PAD).last_hidden_state
    found = ours(captions)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-3, rtol=1e-3), name


def test_it_starts_as_transformers_does() -> None:
    ours, theirs = Bert(50, dropout=0.1, **SHAPE).state_dict(), _reference().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        # the second segment's embedding has too few values to tell their deviation
        assert value.numel() < 500 or ours[name].std().item() == pytest.approx(value.std().item(), rel=0.1), name
        assert value.ndim > 1 or torch.equal(ours[name], value)
    assert not ours["embeddings.word_embeddings.weight"][PAD].any()


def test_dropout_is_for_training_only(captions: torch.Tensor) -> None:
    bert = Bert(50, dropout=0.5, **SHAPE)
    assert not torch.equal(bert(captions), bert(captions))
    bert.eval()
    assert torch.equal(bert(captions), bert(captions))


def test_padded_captions_are_one_graph_for_all_lengths(captions: torch.Tensor) -> None:
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(Bert(50, dropout=0.1, **SHAPE).train())(captions)
    assert explanation.graph_break_count == 0, explanation.break_reasons
    graphs = 0

    def count(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(Bert(50, dropout=0.1, **SHAPE).train(), backend=count)
    for kept in (12, 5, 1):
        compiled(captions.where(torch.arange(12) < kept, PAD))
    assert graphs == 1


def test_checkpointed_layers_learn_the_same(captions: torch.Tensor) -> None:
    bert = Bert(50, dropout=0.0, **SHAPE)
    gradients = []
    for enabled in (False, True):
        bert.activation_checkpointing = enabled
        bert.zero_grad()
        bert(captions).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in bert.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients))
