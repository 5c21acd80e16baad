"""The order of a training is that of numpy's permutations, whatever they are kept in."""

import numpy as np
import pytest

from cfssl.data.order import EpochOrder
from cfssl.seeds import numpy_generator


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (10, 3), (1000, 7)])
def test_each_epoch_is_a_permutation_of_its_seed_cut_into_batches(count: int, batch: int) -> None:
    order = EpochOrder(count, batch, epochs=3, seed=5)
    steps = count // batch
    assert len(order) == 3 * steps
    for step in (*range(3 * steps), 0):
        epoch, place = divmod(step, steps)
        expected = numpy_generator(5, "epoch", epoch).permutation(count)[place * batch : (place + 1) * batch]
        found = order.items(step)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)
