"""State in fewer bits: exact remainders, moments in bf16, on any number of ranks with the same bits.

Remainders and random bits are proved for all patterns; training shows that they are used, in pairs of settings.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.precision import (
    holds,
    join,
    random_bits,
    remainder_of,
    round_stochastically,
    split,
    takes,
    weight_of,
)
from tests.models import BF16, F32
from tests.simulated import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests

# --- remainders ---


def patterns(*words: int) -> Tensor:
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32).view(F32)


def test_parameter_and_remainder_are_the_fp32_value_bit_for_bit() -> None:
    """Every exponent, both signs, all ties between two bf16 values among them."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        value = (upper | lower).view(F32)
        restored = join(*split(value))
        finite = ~value.isnan()
        assert torch.equal(restored[finite].view(torch.int32), value[finite].view(torch.int32))
        assert restored[~finite].isnan().all()
    random = torch.randint(-(2**31), 2**31, (1_000_000,)).to(torch.int32).view(F32)
    finite = ~random.isnan()
    assert torch.equal(join(*split(random))[finite].view(torch.int32), random[finite].view(torch.int32))


def test_a_remainder_fits_a_parameter_that_others_have_rounded_and_is_0_once_that_is_changed() -> None:
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        value = (upper | lower).view(F32)
        param, remainder = split(value)
        assert torch.equal(remainder_of(value, param), remainder)
        even = value.to(BF16)  # ties go to even: torch's way
        restored, finite = join(even, remainder_of(value, even)), ~value.isnan()
        apart = (restored[finite].view(torch.int32).long() - value[finite].view(torch.int32).long()).abs()
        assert apart.max() <= (lower == 0x8000), "at a tie, and only there, it is the number next to it"
        assert not torch.equal(param[finite], even[finite]) or lower != 0x8000
        assert restored[~finite].isnan().all()
    value = torch.randn(1000)
    changed = split(value)[0] * 1.5
    assert torch.equal(join(changed, remainder_of(value, changed)), changed.float())
    zeros, stale = torch.tensor([0.0, -0.0], dtype=BF16), torch.tensor([-5, -5], dtype=torch.int16)
    assert not join(zeros, stale).any(), "set to zero by others, it starts again from there, where below is nan"


def test_the_parameter_is_the_nearest_bf16_value_and_ties_go_away_from_zero() -> None:
    value = torch.randn(1_000_000)
    value = value[value.view(torch.int32) & 0xFFFF != 0x8000]
    assert torch.equal(split(value)[0], value.to(BF16)), "away from ties there is one nearest value"
    ties = patterns(0x3F808000, 0xBF808000, 0x3F818000, 0x00008000)
    assert torch.equal(split(ties)[0], torch.tensor([1.0078125, -1.0078125, 1.015625, 2.0**-133]).to(BF16))
    assert split(patterns(0x7F7FFFFF))[0].item() == float("inf") and join(*split(patterns(0x7F7FFFFF))).isfinite()
    assert split(patterns(0x7FFFFFFF, 0xFFFFFFFF))[0].isnan().all(), "a payload must not overflow into a number"
    assert weight_of(ties, torch.float16).dtype is torch.float16


def test_weights_that_others_have_rounded_do_not_count_as_edited() -> None:
    """Their ties go to even, as in a checkpoint of DeepSpeed's: the fp32 main parameter is still what it was."""
    main = patterns(0x3F808000, 0xBF808000, 0x3F818000)
    model = nn.Linear(3, 1, bias=False, dtype=BF16)
    optimizer = ShardedDecoupledAdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    state = optimizer.state_dict()
    state["state"][0]["main_param"] = main.view(1, 3)
    optimizer.load_state_dict(state)
    model.load_state_dict({"weight": main.to(BF16).view(1, 3)})
    assert not torch.equal(model.weight.detach().view(-1), split(main)[0])
    model.weight.grad = torch.zeros(1, 3, dtype=BF16)
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["main_param"].view(-1), main)
    assert torch.equal(model.weight.detach().view(-1), split(main)[0])


# --- which dtype holds the values of which ---

DTYPES = [F32, BF16, torch.float16, torch.float64, torch.complex64, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def edges(dtype: torch.dtype) -> Tensor:
    """The values next to a power of two as patterns of bits, and the largest."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    real = dtype.to_real()
    num_bits = 8 * real.itemsize
    near = {sign * 2**k + d for sign in (-1, 1) for k in range(num_bits - 1) for d in (-1, 0, 1)}
    words = [-(2 ** (num_bits - 1)), *sorted(near), 2 ** (num_bits - 1) - 1]
    values = torch.tensor(words, dtype=getattr(torch, f"int{num_bits}")).view(real)
    if real.is_floating_point:
        values = torch.cat([values, torch.tensor([torch.finfo(real).max, float("inf")], dtype=real)])
    return torch.complex(values, values.flip(0)) if dtype.is_complex else values


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_dtype_holds_another_where_each_value_comes_through_a_conversion_as_it_was() -> None:
    for other in DTYPES:
        values = edges(other)
        for dtype in DTYPES:
            converted = zip(values.tolist(), values.to(dtype).tolist(), strict=True)
            comes_through = all(one == two or (one != one and two != two) for one, two in converted)
            assert holds(dtype, other) == comes_through, f"{other} in {dtype}"
    assert holds(torch.float8_e5m2, torch.float8_e5m2) and not holds(torch.float8_e5m2, F32)


def test_a_count_of_steps_may_come_in_any_dtype_that_has_it_exactly() -> None:
    assert takes(F32, torch.tensor(1001)) and takes(F32, torch.tensor(3.0, dtype=torch.float64))
    assert not takes(F32, torch.tensor(2**24 + 1)) and not takes(BF16, torch.tensor(1001))
    assert not takes(F32, torch.tensor([1001])) and takes(F32, torch.ones(1, dtype=BF16))


# --- stochastic rounding ---


def test_stochastic_rounding_is_right_on_average_and_exact_values_stay() -> None:
    elements = torch.arange(400_000)
    for fraction in (0.1, 0.5, 0.9):
        value = torch.full((len(elements),), 1.0 + fraction * 2**-7)
        for bits in random_bits(torch.tensor(9.0), elements):
            rounded = round_stochastically(value, bits).float()
            assert set(rounded.tolist()) == {1.0, 1.0078125}
            # A mean of n coin tosses is within 5 / (2 sqrt(n)) of its expectation, but for once in a million.
            assert abs((rounded > 1).double().mean().item() - fraction) < 2.5 / len(elements) ** 0.5
    kept = torch.tensor([0.0, -0.0, 1.0, -3.0, 2.0**-133, float("inf"), -float("inf")])
    for bits in (0, 0xFFFF):
        assert torch.equal(round_stochastically(kept, torch.full((7,), bits)).float(), kept)
    assert round_stochastically(torch.tensor([float("nan")]), torch.tensor([0xFFFF])).isnan().all()


def test_random_bits_depend_on_step_and_element_and_on_nothing_else() -> None:
    elements = torch.arange(200_000)
    first = random_bits(torch.tensor(1.0), elements)
    streams = {
        "the other moment": first[1],
        "another step": random_bits(torch.tensor(2.0), elements)[0],
        "other elements": random_bits(torch.tensor(1.0), elements + len(elements))[0],
        "elements 2**32 on": random_bits(torch.tensor(1.0), elements + 2**32)[0],
        "the neighbour": first[0].roll(1),
        "the neighbour's next step": random_bits(torch.tensor(2.0), elements)[0].roll(1),
    }
    for name, stream in streams.items():
        correlation = torch.corrcoef(torch.stack([first[0].double(), stream.double()]))[0, 1]
        assert abs(correlation) < 5 / len(elements) ** 0.5, name
    for bits in first:
        counts = torch.bincount(bits >> 8, minlength=256).double()
        chi_squared = ((counts - len(elements) / 256) ** 2 / (len(elements) / 256)).sum()
        assert chi_squared < 255 + 5 * (2 * 255) ** 0.5, "not uniform"
    assert torch.equal(random_bits(torch.tensor(1.0), elements[1000:])[0], first[0][1000:])


def test_random_bits_stay_what_they_were() -> None:
    """Else a run that is resumed with another version would not go on as it began."""
    bits = random_bits(torch.tensor(3.0), torch.tensor([0, 1, 2**31, 2**32 + 7]))
    assert [each.tolist() for each in bits] == [[18547, 25497, 3103, 2681], [2289, 29906, 64160, 51764]]


# --- training, sharded ---


NARROW: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32 with bf16 moments": (F32, {}),
    "bf16 with remainder and bf16 moments": (BF16, dict(main_parameter=MainParameter.REMAINDER)),
}


def train(
    group: Any, case: str, amsgrad: bool, bucket_cap_mb: float
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """This rank's fragments of the state, and the parameters. All ranks bring the same gradients."""
    dtype, settings = NARROW[case]
    draw = torch.Generator().manual_seed(0)
    sizes = (1000, 7, 4096, 64, 513, 256 * 17, 256 * 16 + 1)
    params = {f"p{i}": nn.Parameter(torch.randn(size, generator=draw).to(dtype)) for i, size in enumerate(sizes)}
    config = ShardingConfig(moments=Moments.BF16, bucket_cap_mb=bucket_cap_mb, **settings)
    optimizer = ShardedDecoupledAdamW(
        params.items(), lr=1e-2, weight_decay=1e-4, amsgrad=amsgrad, process_group=group, config=config
    )
    for _ in range(12):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=draw).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in params.items()}
    return state, {name: p.detach().clone() for name, p in params.items()}


@pytest.mark.parametrize(("case", "amsgrad"), [*zip(NARROW, (True, False), strict=True)])
def test_narrow_moments_have_the_same_bits_on_any_number_of_ranks_and_in_any_buckets(case: str, amsgrad: bool) -> None:
    control = on_ranks(1, train, case, amsgrad, 16.0)[0]
    for num_ranks, cap in ((1, 2.0**-16), (2, 16.0), (2, 2.0**-16), (4, 2.0**-7)):
        results = on_ranks(num_ranks, train, case, amsgrad, cap)
        for name, entries in control[0].items():
            assert torch.equal(results[0][1][name], control[1][name]), f"{name} on {num_ranks} ranks, {cap} MiB"
            for key in set(entries) - {"step"}:
                whole = torch.cat([state[name][key] for state, _ in results])
                assert torch.equal(whole, entries[key]), f"{name}: {key}"


def test_parameters_with_equal_values_are_rounded_independently() -> None:
    params = [nn.Parameter(torch.ones(512)) for _ in range(3)]
    optimizer = ShardedDecoupledAdamW(params, config=ShardingConfig(moments=Moments.BF16))
    for param in params:
        param.grad = torch.linspace(0.1, 0.2, 512)
    optimizer.step()
    first, second, third = (optimizer.state[param]["exp_avg"].float() for param in params)
    assert not torch.equal(first, second) and not torch.equal(first, third) and not torch.equal(second, third)
    torch.testing.assert_close(first, second, rtol=2**-7, atol=0.0)


def test_bf16_second_moments_fall_where_rounding_to_nearest_would_freeze_them() -> None:
    """From gradients of size 1 to gradients of size 1e-2: exp_avg_sq falls from 1 towards 1e-4."""
    beta2 = 0.997
    final = {}
    for moments in (Moments.FP32, Moments.BF16):
        param = nn.Parameter(torch.zeros(256))
        optimizer = ShardedDecoupledAdamW([param], betas=(0.9, beta2), config=ShardingConfig(moments=moments))
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        for _ in range(int(4 / (1 - beta2))):
            param.grad = torch.full_like(param, 1e-2)
            optimizer.step()
            optimizer.zero_grad()
        final[moments] = optimizer.state[param]["exp_avg_sq"].float()
    assert (final[Moments.FP32] < 0.02).all()
    torch.testing.assert_close(final[Moments.BF16].mean(), final[Moments.FP32].mean(), rtol=0.1, atol=0.0)

    stuck = torch.tensor(1.0, dtype=BF16)
    for _ in range(1000):
        stuck = (beta2 * stuck.float() + (1 - beta2) * 1e-4).to(BF16)
    assert stuck > 0.6, "rounded to the nearest it would have frozen: else this test shows nothing"


def test_rounding_moments_to_nearest_is_refused_where_it_would_freeze_them() -> None:
    config = ShardingConfig(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)
    param = nn.Parameter(torch.zeros(8, dtype=BF16))
    with pytest.raises(ValueError, match=r"beta2 <= 0\.995 .*bfloat16.*0\.999.*never falls again.*Moments\.BF16"):
        ShardedDecoupledAdamW([param], betas=(0.9, 0.999), config=config)
    optimizer = ShardedDecoupledAdamW([param], betas=(0.9, 0.995), config=config)
    ShardedDecoupledAdamW(
        [nn.Parameter(torch.zeros(8))], betas=(0.9, 0.999), config=config
    )  # fp32 moments do not freeze
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"beta2 <= 0\.995"):
        optimizer.step()


def test_the_unsharded_optimizer_warns_of_moments_that_would_freeze(caplog: pytest.LogCaptureFixture) -> None:
    """Once for a dtype and beta2, in a process that may have warned of usual ones."""
    for dtype, beta2, num_warnings in ((BF16, 0.995, 0), (F32, 0.99901, 0), (BF16, 0.99901, 1), (BF16, 0.99901, 1)):
        param = nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = DecoupledAdamW([param], betas=(0.9, beta2))
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
        assert len([r for r in caplog.records if "never falls again" in r.getMessage()]) == num_warnings


def test_the_main_parameter_is_there_before_the_first_step() -> None:
    param = nn.Parameter(torch.linspace(-2.0, 2.0, 15).view(5, 3).to(BF16))
    (state,) = ShardedDecoupledAdamW([param]).state_dict()["state"].values()
    assert torch.equal(state["main_param"], param.float())


def test_small_decays_of_bf16_weights_add_up() -> None:
    """1e-4 per step for 300 steps; a bf16 weight alone would stay where it is."""
    weights = {}
    for kept in (MainParameter.REMAINDER, MainParameter.NONE):
        param = nn.Parameter(torch.linspace(0.5, 2.0, 512).to(BF16))
        start = param.detach().float()
        optimizer = ShardedDecoupledAdamW(
            [param], lr=1e-3, weight_decay=1e-4, config=ShardingConfig(main_parameter=kept)
        )
        for _ in range(300):
            param.grad = torch.zeros_like(param)
            optimizer.step()
            optimizer.zero_grad()
        weights[kept] = param.detach().float() / start
    # Each weight is the nearest of 256 per octave.
    torch.testing.assert_close(
        weights[MainParameter.REMAINDER].mean(), torch.tensor((1 - 1e-4) ** 300), rtol=0, atol=2e-4
    )
    assert (weights[MainParameter.NONE] == 1).all()
