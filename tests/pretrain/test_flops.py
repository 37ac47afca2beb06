"""FLOPs against counts made by hand: 2 for a multiply-add, the backward pass twice the forward pass."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from cots.model.text_tower import TextTower
from cots.model_config import TextTowerConfig
from pretrain.flops import count_flops, flops_per_pair, matrix_rate

BATCH, TOKENS, WIDTH, HEADS = 2, 10, 32, 4


def _block_forward(batch: int, tokens: int, width: int, hidden: int) -> int:
    """Query, key, value and output projections, scores and weighted values, two feed-forward layers."""
    projections = 4 * 2 * batch * tokens * width * width
    attention = 2 * 2 * batch * tokens * tokens * width
    feed_forward = 2 * 2 * batch * tokens * width * hidden
    return projections + attention + feed_forward


def test_a_vision_transformer_block_forward_and_backward() -> None:
    block = Block(WIDTH, HEADS, qkv_bias=True)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    forward = _block_forward(BATCH, TOKENS, WIDTH, 4 * WIDTH)
    assert count_flops(lambda: block(x)) == forward
    assert count_flops(lambda: block(x).sum().backward()) == 3 * forward
    with torch.no_grad():
        assert count_flops(lambda: block.eval()(x)) == forward


@pytest.mark.parametrize("padded", [False, True])
def test_a_bert_layer(padded: bool) -> None:
    tower = TextTower(
        TextTowerConfig(vocabulary=50, width=WIDTH, layers=1, heads=HEADS, intermediate=48, positions=16, max_length=16)
    )
    token_ids = torch.randint(1, 50, (BATCH, TOKENS))
    if padded:
        token_ids[:, 6:] = 0
    forward = _block_forward(BATCH, TOKENS, WIDTH, 48)
    assert count_flops(lambda: tower(token_ids)) == forward
    assert count_flops(lambda: tower(token_ids).tokens.sum().backward()) == 3 * forward


def test_a_convolution_whose_input_needs_no_gradient() -> None:
    convolution = nn.Conv2d(3, 8, kernel_size=3, padding=1)
    pixels = torch.randn(BATCH, 3, 12, 12)
    forward = 2 * BATCH * 12 * 12 * 8 * 3 * 9
    assert count_flops(lambda: convolution(pixels)) == forward
    assert count_flops(lambda: convolution(pixels).sum().backward()) == 2 * forward


def test_the_fused_inference_path_of_multi_head_attention_counts() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    with torch.no_grad():
        counted = count_flops(lambda: attention(x, x, x, need_weights=False))
    assert counted == 4 * 2 * BATCH * TOKENS * WIDTH * WIDTH + 2 * 2 * BATCH * TOKENS * TOKENS * WIDTH
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_activation_checkpointing_computes_again_does_not_count(reentrant: bool) -> None:
    blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(2))
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)

    def step(checkpointed: bool) -> None:
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=reentrant) if checkpointed else block(y)
        y.sum().backward()

    assert count_flops(lambda: step(True)) == count_flops(lambda: step(False))


def test_compiled_modules_count_as_eager_ones() -> None:
    block = Block(WIDTH, HEADS)
    block.compile()
    assert count_flops(lambda: block(torch.randn(BATCH, TOKENS, WIDTH))) == _block_forward(
        BATCH, TOKENS, WIDTH, 4 * WIDTH
    )


def test_flops_per_pair_follow_a_batch_that_is_compared_with_itself() -> None:
    layer, queue = nn.Linear(WIDTH, 16), torch.randn(50, 16)

    def step(size: int) -> None:
        embedding = layer(torch.randn(size, WIDTH))
        ((embedding @ embedding.T).sum() + (embedding @ queue.T).sum()).backward()

    assert flops_per_pair(step, 96) == pytest.approx(count_flops(lambda: step(96)) / 96)


def test_a_cpu_has_no_matrix_rate() -> None:
    assert matrix_rate(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_a_gpu_leaves_its_random_state() -> None:
    before = torch.cuda.get_rng_state()
    assert (matrix_rate(torch.device("cuda")) or 0) > 1e12
    assert torch.equal(torch.cuda.get_rng_state(), before)
