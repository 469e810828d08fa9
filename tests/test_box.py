import jax.numpy as jnp
import numpy as np

from smallgain_jax.search.box import Box


def test_box_projects_and_blocks():
    box = Box(jnp.zeros(2), jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(box.project(jnp.asarray([-1.0, 3.0])), [0.0, 2.0])
    blocked = box.blocks(jnp.asarray([0.0, 2.0]), jnp.asarray([-1.0, -1.0]))
    np.testing.assert_array_equal(blocked, [True, False])
