"""Labels of a chart keep apart and stay near their markers."""

from __future__ import annotations

import itertools

from hf_sparse.reporting.label_placement import place_labels

CROWD = [(150 + 2.0 * index, 100 + 3.0 * (index % 3)) for index in range(7)] + [(300.0, 50.0)]
SIZE, ROOM, RADIUS = (16.0, 12.0), (40.0, 0.0, 360.0, 180.0), 4.0


def test_labels_cover_neither_each_other_nor_markers_and_stay_inside() -> None:
    spots = place_labels(CROWD, [SIZE] * len(CROWD), ROOM, RADIUS)
    places = [spot[:2] for spot in spots if spot is not None]
    assert len(places) == len(CROWD)
    for (x, y), (other_x, other_y) in itertools.combinations(places, 2):
        assert abs(x - other_x) >= SIZE[0] - 0.1 or abs(y - other_y) >= SIZE[1] - 0.1
    for x, y in places:
        assert ROOM[0] + SIZE[0] / 2 <= x <= ROOM[2] - SIZE[0] / 2
        assert not any(abs(x - a) < SIZE[0] / 2 - 0.1 and abs(y - b) < SIZE[1] / 2 - 0.1 for a, b in CROWD)


def test_label_with_room_is_next_to_its_marker_and_far_ones_are_marked_as_such() -> None:
    spots = place_labels(CROWD, [SIZE] * len(CROWD), ROOM, RADIUS)
    alone = spots[-1]
    assert alone is not None
    assert not alone.far
    assert max(abs(alone.x - 300), abs(alone.y - 50)) < SIZE[0]
    assert any(spot is not None and spot.far for spot in spots)


def test_marker_without_label_has_none() -> None:
    assert place_labels([(50.0, 50.0), (52.0, 50.0)], [None, SIZE], ROOM, RADIUS)[0] is None
