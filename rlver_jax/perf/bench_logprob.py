"""Log-probabilities over Qwen2.5's vocabulary: in chunks of it, as training reads them, against all logits at once.

Values and gradients of the sum of log-probabilities and entropies, of the size of Qwen2.5-0.5B.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.perf.bench_timing import Tell, alternate, difference, ratios

ROWS, LENGTH, VOCABULARY, HIDDEN = 2, 512, 151_936, 896


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Seconds and peak extra memory of both ways, and by how much their gradients differ."""
    tell("compiling")
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (ROWS, LENGTH, HIDDEN))
    head = jax.random.normal(keys[1], (VOCABULARY, HIDDEN)) * 0.05
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCABULARY)
    functions = {"chunked": token_logprobs, "full": _full}
    programs = {name: _program(function, targets).lower(hidden, head).compile() for name, function in functions.items()}
    ways = {name: (lambda program=program: program(hidden, head)) for name, program in programs.items()}
    tell("the first run of each")
    results = {name: way() for name, way in ways.items()}
    seconds = alternate(ways, repeats, tell)
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    return {
        "tokens": ROWS * LENGTH,
        "vocabulary": VOCABULARY,
        "ways": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "extra_bytes": memory[name],
                "all_seconds": seconds[name],
            }
            for name in ways
        },
        "full_over_chunked_memory": memory["full"] / memory["chunked"],
        "chunked_over_full_time": ratios(seconds["chunked"], seconds["full"]),
        "largest_difference": difference(results["chunked"], results["full"]),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    size = f"{results['tokens']} tokens, vocabulary {results['vocabulary']}"
    text = [f"{size}: values and gradients of log-probs and entropies"]
    for name, way in results["ways"].items():
        text.append(
            f"{name:8} {way['seconds']:7.2f} s  {way['extra_bytes'] / 1e6:7.0f} MB beside arguments and results"
        )
    r = results["chunked_over_full_time"]
    text.append(
        f"chunked needs 1/{results['full_over_chunked_memory']:.1f} of the memory and {r['median']:.2f} x the time "
        f"({r['least']:.2f} to {r['most']:.2f}); gradients differ by {results['largest_difference']:.1e} of the largest"
    )
    return text


def _full(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    log_p = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head))
    return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)


def _program(function: Callable, targets: Array):
    def loss(hidden: Array, head: Array) -> Array:
        logprob, entropy = function(hidden, head, targets)
        return logprob.sum() + entropy.sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))
