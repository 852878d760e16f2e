"""Intervals: what has no value in a draw has none, without a warning; what has one lies around the figure."""

from pearl.evaluation.measures import intervals


def test_a_figure_without_a_value_in_a_draw_has_no_interval():
    totals = intervals.gathered([("a", [1, 2]), ("b", [0, 0]), ("c", [0, 0])])  # 0 / 0 where "a" is not drawn
    assert intervals.interval(totals, lambda right, read: right / read) is None


def test_an_interval_lies_around_its_figure():
    totals = intervals.gathered((str(problem), [problem, 10]) for problem in range(10))
    low, high = intervals.interval(totals, lambda right, read: right / read)
    assert low < 0.45 < high
