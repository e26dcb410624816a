"""The layout, as properties: every element owned exactly once, aligned, in equal shards, for any number of ranks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_dadamw.layout.bucket_layout import ALIGNMENT, BucketLayout, plan_buckets

sizes = st.one_of(st.integers(0, 300), st.integers(0, 40).map(lambda k: k * ALIGNMENT), st.integers(0, 2_000_000))
any_sizes = st.lists(sizes, min_size=1, max_size=25)
few_ranks = st.integers(1, 9)
many_ranks = st.integers(1, 16_384)


def in_slot_order(numels: list[int]) -> tuple[int, ...]:
    """The order in which plan_buckets would place these sizes in one bucket."""
    (indices,) = plan_buckets(numels, cap=sum(numels) + 1)
    return tuple(numels[index] for index in indices)


@given(any_sizes, many_ranks)
def test_shards_are_equal_aligned_and_waste_less_than_one_alignment_unit_per_rank(
    numels: list[int], num_ranks: int
) -> None:
    layout = BucketLayout(in_slot_order(numels), num_ranks)
    starts_and_stops = [layout.shard_range(rank) for rank in {0, num_ranks // 2, num_ranks - 1}]
    assert {stop - start for start, stop in starts_and_stops} == {layout.shard_numel}
    assert all(start % ALIGNMENT == 0 for start, _ in starts_and_stops)
    assert layout.shard_range(num_ranks - 1)[1] == layout.numel
    assert layout.shard_numel < sum(numels) / num_ranks + ALIGNMENT
    assert layout.numel >= sum(numels)


@given(any_sizes, st.integers(1, 300))
def test_every_element_of_every_parameter_is_owned_by_exactly_one_rank(numels: list[int], num_ranks: int) -> None:
    layout = BucketLayout(in_slot_order(numels), num_ranks)
    next_element = [0] * len(layout.numels)
    for rank in range(num_ranks):
        shard_cursor = 0
        for fragment in layout.fragments(rank):
            assert fragment.numel > 0
            assert fragment.param_start == next_element[fragment.slot], "in order, without gap or overlap"
            assert fragment.shard_start == shard_cursor, "fragments lie end to end in the shard"
            next_element[fragment.slot] += fragment.numel
            shard_cursor += fragment.numel
        assert shard_cursor <= layout.shard_numel
    assert next_element == list(layout.numels)


@given(any_sizes, many_ranks, st.data())
def test_an_element_is_found_where_its_flat_position_says(
    numels: list[int], num_ranks: int, data: st.DataObject
) -> None:
    layout = BucketLayout(in_slot_order(numels), num_ranks)
    nonempty = [slot for slot, numel in enumerate(layout.numels) if numel]
    if not nonempty:
        assert layout.numel == 0
        return
    slot = data.draw(st.sampled_from(nonempty))
    element = data.draw(st.integers(0, layout.numels[slot] - 1))
    position = layout.offsets[slot] + element
    owner = position // layout.shard_numel
    fragment = layout.fragment(slot, owner)
    assert fragment in list(layout.fragments(owner))
    assert fragment.param_start <= element < fragment.param_start + fragment.numel
    in_shard = fragment.shard_start + element - fragment.param_start
    assert owner * layout.shard_numel + in_shard == position
    for other in {0, num_ranks - 1, owner - 1, owner + 1} - {owner, -1, num_ranks}:
        elsewhere = layout.fragment(slot, other)
        assert not elsewhere.param_start <= element < elsewhere.param_start + elsewhere.numel


@given(any_sizes)
def test_parameters_of_aligned_size_start_aligned_and_ragged_ones_follow_without_gaps(numels: list[int]) -> None:
    layout = BucketLayout(in_slot_order(numels), 1)
    for offset, numel in zip(layout.offsets, layout.numels, strict=True):
        if numel % ALIGNMENT == 0:
            assert offset % ALIGNMENT == 0
    assert layout.numel - layout.used < ALIGNMENT


@given(any_sizes, few_ranks, few_ranks)
def test_the_order_of_slots_does_not_depend_on_the_number_of_ranks(numels: list[int], one: int, other: int) -> None:
    ordered = in_slot_order(numels)
    assert BucketLayout(ordered, one).offsets == BucketLayout(ordered, other).offsets


@given(any_sizes, st.integers(0, 500_000))
def test_every_parameter_is_in_exactly_one_bucket_and_buckets_keep_to_their_cap(numels: list[int], cap: int) -> None:
    buckets = plan_buckets(numels, cap=cap)
    assert Counter(index for bucket in buckets for index in bucket) == Counter(range(len(numels)))
    for bucket in buckets:
        assert len(bucket) == 1 or sum(numels[index] for index in bucket) <= cap
    # Backward produces the last parameters' gradients first.
    assert [max(bucket) for bucket in buckets] == sorted((max(bucket) for bucket in buckets), reverse=True)


def test_a_bucket_holds_at_least_one_parameter_and_none_of_negative_size() -> None:
    with pytest.raises(AssertionError, match="at least one parameter"):
        BucketLayout((), 2)
    with pytest.raises(AssertionError):
        BucketLayout((-1,), 2)
