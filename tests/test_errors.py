"""The parts of sentences for the user."""

from cfssl.errors import listed, nearest, quoted


def test_rows_are_counted_and_three_are_named() -> None:
    assert listed([7]) == "row 7"
    assert listed([7, 8]) == "2 rows (7, 8)"
    assert listed(range(9)) == "9 rows (0, 1, 2, ...)"
    assert listed([4], 30) == "30 rows (4, ...)"


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all() -> None:
    assert nearest("Scaner", ["scanner", "sex"]) == "; the nearest is 'scanner'"
    assert nearest("zzz", ["scanner", "sex"]) == "; known are 'scanner', 'sex'"
    assert nearest(3, []) == "; there are none"


def test_many_names_are_cut() -> None:
    assert quoted("abc") == "'a', 'b', 'c'"
    assert quoted(range(15)).endswith("10, 11 and 3 more")
