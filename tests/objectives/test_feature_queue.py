import torch

from cots.objectives.feature_queue import NO_ITEM, FeatureQueue


def _pairs(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(start, start + count)
    return ids[:, None].float().repeat(1, 4), -ids[:, None].float().repeat(1, 4), ids


def test_a_size_that_is_no_multiple_of_the_batch_wraps_around() -> None:
    queue = FeatureQueue(5, 4)
    queue.enqueue(*_pairs(0, 3))
    assert queue.fill.item() == 3
    assert queue.item_ids.tolist() == [0, 1, 2, NO_ITEM, NO_ITEM]
    queue.enqueue(*_pairs(3, 3))
    assert queue.fill.item() == 5
    assert queue.pointer.item() == 1
    assert queue.item_ids.tolist() == [5, 1, 2, 3, 4]
    queue.enqueue(*_pairs(6, 3))
    assert queue.item_ids.tolist() == [5, 6, 7, 8, 4]


def test_both_queues_keep_the_rows_of_a_pair_together() -> None:
    queue = FeatureQueue(7, 4)
    for start in range(0, 40, 4):
        queue.enqueue(*_pairs(start, 4))
        written = queue.item_ids != NO_ITEM
        assert torch.equal(queue.image[written][:, 0], queue.item_ids[written].float())
        assert torch.equal(queue.text[written], -queue.image[written])


def test_a_batch_larger_than_the_queue_leaves_its_newest_pairs() -> None:
    queue = FeatureQueue(3, 4)
    queue.enqueue(*_pairs(0, 8))
    assert sorted(queue.item_ids.tolist()) == [5, 6, 7]


def test_unwritten_rows_and_other_captions_of_the_same_item_are_no_negatives() -> None:
    queue = FeatureQueue(6, 4)
    queue.enqueue(*_pairs(0, 4))
    allowed = queue.negatives_of(torch.tensor([2, 9]))
    assert allowed.tolist() == [[True, True, False, True, False, False], [True, True, True, True, False, False]]


def test_an_empty_queue_takes_nothing() -> None:
    queue = FeatureQueue(0, 4)
    queue.enqueue(*_pairs(0, 2))
    assert queue.negatives_of(torch.tensor([1])).shape == (1, 0)
