"""A plan compiles the programs that the trainer runs: their text is the same, letter by letter."""

import jax
import pytest

from configs import debug
from rlver_jax.assembly import assemble
from rlver_jax.dialogue import sample_dialogues
from rlver_jax.learning.update import compile_step
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.plans.programs import Texts, programs_of, shapes_of
from rlver_jax.trainer import pack_batch, score
