"""Every transformation of optax and its contrib, read from optax itself."""

import inspect

import jax
import optax
import optax.contrib

SPECIAL = {
    "fromage": lambda: optax.fromage(0.01),
    "sm3": lambda: optax.sm3(0.01),
    "dpsgd": lambda: optax.contrib.dpsgd(0.01, 1.0, 0.1, 0),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(0.01)),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.01), optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.01), 0.01),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(optax.adam(0.01)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.01), optax.contrib.reduce_on_plateau(patience=10**6)
    ),
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=jax.random.key(0)),
    "apply_every": lambda: optax.chain(optax.apply_every(3), optax.sgd(0.01)),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.01),
}
CANNOT_UPDATE = {"lookahead", "scale_by_muon", "scale_by_distance_over_gradients"}
"""They raise at this tree themselves."""


def catalogue():
    """Name and optimizer of every function of optax that makes one from a learning rate."""
    made = {}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(make)
            if "GradientTransformation" not in str(signature.return_annotation):
                continue
            given = [0.01] if "learning_rate" in signature.parameters else []
            if name in SPECIAL:
                made[name] = SPECIAL[name]
                continue
            try:
                signature.bind(*given)
            except TypeError:
                continue  # a wrapper, or a part of a chain: see the other tests
            if name not in ("chain", *CANNOT_UPDATE):
                made[name] = lambda make=make, given=given: make(*given)
    return made


def parameters_of(name):
    """What the function of that name takes."""
    make = getattr(optax, name, None) or getattr(optax.contrib, name)
    return set(inspect.signature(make).parameters)
