"""The box counter against cases countable by hand and sets of known dimension."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from netassay.numerics.box_counting import box_counts, box_sizes, densest_patch, dimension, edge

MASKS = arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def _grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels of the unit square: x (1, pixels) and y (pixels, 1)."""
    places = (np.arange(pixels) + 0.5) / pixels
    return places[None, :], places[:, None]


def test_edge_of_a_square_is_its_rim() -> None:
    inside = np.zeros((7, 7), dtype=bool)
    inside[1:6, 1:6] = True
    rim = inside.copy()
    rim[2:5, 2:5] = False
    assert (edge(inside) == rim).all()


def test_edge_is_one_sided_and_diagonals_are_no_neighbours() -> None:
    inside = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=bool)
    assert edge(inside).tolist() == [[False] * 3, [False, False, True], [False, True, False]]


@pytest.mark.parametrize("value", [True, False])
def test_a_picture_of_one_class_has_no_edge(value: bool) -> None:
    inside = np.full((9, 5), value)
    assert not edge(inside).any()
    assert dimension(edge(inside), sizes=(1, 2, 4)) is None


@given(MASKS)
def test_edges_of_both_classes_meet_at_every_change(inside: np.ndarray) -> None:
    either = edge(inside) | edge(~inside)
    assert not (edge(inside) & ~inside).any()
    changes = inside[:, 1:] != inside[:, :-1]
    assert (either[:, 1:][changes] & either[:, :-1][changes]).all()
    changes = inside[1:] != inside[:-1]
    assert (either[1:][changes] & either[:-1][changes]).all()


def test_boxes_of_a_full_square_are_counted_by_hand() -> None:
    # 8 x 8 pixels hold 64 boxes of side 1, 16 of side 2, 9 of side 3 (the last stick out), 4 of side 4, 1 of side 8.
    assert box_counts(np.ones((8, 8), dtype=bool), (1, 2, 3, 4, 8)).tolist() == [64, 16, 9, 4, 1]


@given(MASKS, st.integers(1, 9))
def test_box_counts_agree_with_counting_boxes_one_by_one(mask: np.ndarray, size: int) -> None:
    corners = {(row // size, column // size) for row, column in np.argwhere(mask).tolist()}
    assert box_counts(mask, [size]).tolist() == [len(corners)]


@given(MASKS)
def test_a_box_splits_into_one_to_four_boxes_of_half_its_side(mask: np.ndarray) -> None:
    fine, coarse = box_counts(mask, (2, 4)).tolist()
    assert coarse <= fine <= 4 * coarse


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), None])
def test_a_point_a_line_and_a_square_have_dimensions_0_1_2(sizes: tuple[int, ...] | None) -> None:
    point, line, square = (np.zeros((256, 256), dtype=bool) for _ in range(3))
    point[100, 30] = line[77] = square[:] = True
    for mask, expected in ((point, 0.0), (line, 1.0), (square, 2.0)):
        found = dimension(mask, sizes)
        assert found is not None
        assert found.value == pytest.approx(expected, abs=1e-12)
        if expected:  # a point lies in one block: nothing to resample
            assert (found.low, found.high) == pytest.approx((expected, expected), abs=1e-12)
        else:
            assert (found.low, found.high) == (None, None)


def test_the_sierpinski_triangle_has_dimension_log_3_over_log_2() -> None:
    # Pascal's triangle modulo 2: pixel (i, j) is set where i & j == 0, three of four quadrants at every scale.
    place = np.arange(512)
    found = dimension((place[:, None] & place[None, :]) == 0)
    assert found is not None
    assert found.value == pytest.approx(np.log(3) / np.log(2), abs=1e-12)
    assert found.counts == tuple(3 ** (9 - power) for power in range(1, 6))


@pytest.mark.parametrize(
    "inside",
    [
        pytest.param(lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.3**2, id="circle"),
        pytest.param(lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.4**2, id="larger circle"),
        pytest.param(lambda x, y: y < 0.3 * x + 0.1, id="line"),
        pytest.param(lambda x, y: y < 0.7 * x + 0.1, id="steeper line"),
    ],
)
def test_smooth_edges_have_dimension_1(inside) -> None:  # type: ignore[no-untyped-def]
    found = dimension(edge(inside(*_grid(1024))))
    assert found is not None
    assert found.value == pytest.approx(1.0, abs=0.05)


def test_a_two_sided_edge_reads_higher_on_the_same_picture() -> None:
    x, y = _grid(1024)
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.3**2
    one, two = dimension(edge(inside)), dimension(edge(inside) | edge(~inside))
    assert one is not None
    assert two is not None
    assert 0.02 < two.value - one.value < 0.10


def test_the_interval_holds_the_value_and_is_the_same_each_time() -> None:
    mask = edge(np.random.default_rng(0).random((256, 256)) < 0.02)
    first, second = dimension(mask), dimension(mask)
    assert first == second
    assert first is not None
    assert first.low is not None
    assert first.high is not None
    assert first.low < first.value < first.high
    assert first.high - first.low < 0.2


@pytest.mark.parametrize(
    "pixels, sizes", [(32, (2,)), (64, (2, 4)), (128, (2, 4, 8)), (512, (2, 4, 8, 16, 32)), (1024, (4, 8, 16, 32, 64))]
)
def test_default_sizes_end_at_a_sixteenth_of_the_picture(pixels: int, sizes: tuple[int, ...]) -> None:
    assert box_sizes(pixels) == sizes


def test_a_picture_too_small_for_a_slope_is_refused() -> None:
    with pytest.raises(ValueError, match="64 pixels"):
        dimension(np.ones((32, 32), dtype=bool))


def test_sizes_that_do_not_nest_are_refused() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        dimension(np.ones((32, 32), dtype=bool), sizes=(2, 3))


@given(arrays(bool, st.tuples(st.integers(4, 20), st.integers(4, 20))), st.integers(1, 4))
def test_no_patch_is_denser_than_the_densest(mask: np.ndarray, side: int) -> None:
    sums = {
        (row, column): int(mask[row : row + side, column : column + side].sum())
        for row in range(mask.shape[0] - side + 1)
        for column in range(mask.shape[1] - side + 1)
    }
    assert densest_patch(mask, side) == max(sums, key=lambda place: (sums[place], -place[0], -place[1]))


def test_a_patch_larger_than_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="no patch"):
        densest_patch(np.ones((7, 20), dtype=bool))
