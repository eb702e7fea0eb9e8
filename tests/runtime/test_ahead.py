"""Reading ahead of who computes."""

import threading

from ear.runtime.ahead import read_ahead


def test_reading_is_one_part_ahead_and_in_order():
    second = threading.Event()

    def read(part):
        if part == 2:
            second.set()
        return -part

    stream = read_ahead(read, [1, 2, 3])
    assert next(stream) == -1
    assert second.wait(10)  # without being asked for
    assert list(stream) == [-2, -3]
    assert list(read_ahead(read, [])) == []
