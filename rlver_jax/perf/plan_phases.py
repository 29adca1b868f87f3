"""The phases of a training step: what each computes, moves and sends, and how long it takes at the chips' limits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from rlver_jax.decoding.cache import shares
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel.mesh import ATTENTION_DATA, batch_parts
from rlver_jax.perf import flops
from rlver_jax.perf.chips import HOP_S, Chip
from rlver_jax.perf.flops import Work
from rlver_jax.perf.hlo import DCN, HOST, Use
from rlver_jax.perf.plan_measure import Measured
from rlver_jax.perf.plan_programs import Shapes
from rlver_jax.rollout.ready import rollout_model
from rlver_jax.training.setup import dialogues_a_row, dialogues_an_update, microbatches_at_most, updates_at_most


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        work: over all chips.
        hbm_bytes: that one chip reads and writes.
        copied_bytes: of these, for copies of large arrays that the compiler lays out anew.
        collectives: by kind, of one chip; kinds of `hlo.DCN` go between slices, of `hlo.HOST` to the chip's host.
        compute_s, memory_s, network_s, dcn_s: at the chip's peak rates, network_s inside a slice, dcn_s between slices;
            the longest of the four is the phase's roofline. What goes to the host has no time.
        latency_s: of the hops of collectives inside a slice, however little they move, as if nothing else went on
            meanwhile: so it is for the small sums of a decode step, less so for gathers that are started ahead.
    """

    name: str
    program: str
    work: Work
    hbm_bytes: float
    collectives: dict[str, Use]
    compute_s: float
    memory_s: float
    network_s: float
    dcn_s: float = 0.0
    latency_s: float = 0.0
    copied_bytes: float = 0.0

    @property
    def roofline_s(self) -> float:
        """Everything overlaps, nothing waits."""
        return max(self.compute_s, self.memory_s, self.network_s, self.dcn_s)

    @property
    def seconds(self) -> float:
        """The roofline, and what collectives wait for their neighbours."""
        return self.roofline_s + self.latency_s

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that useful operations come to in that time."""
        return self.work.useful / self.work.flops * self.compute_s / self.seconds if self.work.flops else 0.0

    @property
    def bandwidth(self) -> float:
        """Share of the memory's bandwidth that is used in that time."""
        return self.memory_s / self.seconds if self.seconds else 0.0


def phases_of(shapes: Shapes, measurements: Sequence[Measured], chip: Chip) -> list[Phase]:
    """All phases of a step whose dialogues are as long as their limits allow."""
    works = _sampling(shapes) | _learning(shapes)
    measured = {one.name: one for one in measurements}
    return [
        _phase(name, work, measured[program], shapes, chip)
        for name, (work, program) in works.items()
        if program in measured
    ]


def _phase(name: str, work: Work, measured: Measured, shapes: Shapes, chip: Chip) -> Phase:
    mesh = shapes.mesh if measured.name == "learn" else shapes.agents.mesh or shapes.mesh
    uses = {kind: use for (phase, kind), use in measured.collectives.items() if phase == name}
    copied = measured.copied.get(name, 0.0)
    tensor, columns = mesh.shape["tensor"], mesh.shape["tensor"] * mesh.shape.get(ATTENTION_DATA, 1)
    hbm = work.weight_bytes / tensor + work.column_bytes / columns + work.spread_bytes / mesh.size + copied
    ici, dcn, _ = (sum(use.bytes for use in over.values()) for over in by_link(uses))
    return Phase(
        name, measured.name, work, hbm, uses, work.flops / mesh.size / chip.flops, hbm / chip.hbm_bandwidth,
        ici / chip.ici_bandwidth, dcn / chip.dcn_bandwidth, HOP_S * sum(use.hops for use in uses.values()), copied,
    )  # fmt: skip


def by_link(uses: dict[str, Use]) -> tuple[dict[str, Use], dict[str, Use], dict[str, Use]]:
    """What stays inside a slice, what goes between slices, and what goes to the chip's host."""
    dcn, host = ({kind: use for kind, use in uses.items() if kind.startswith(link)} for link in (DCN, HOST))
    return {kind: use for kind, use in uses.items() if kind not in dcn | host}, dcn, host


def play_of(shapes: Shapes) -> flops.Play:
    """Lengths of the dialogues."""
    config, (policy, user) = shapes.config, shapes.agents.tables
    batch, parts = config.rollout.batch, batch_parts(shapes.agents.mesh or shapes.mesh)
    profiles, rows = batch // config.rollout.group, shapes.agents.spec.rows_of(batch)
    scripts, system, prefix = (user.appraisal, user.reply), policy.system.shape[0], shapes.profiles.prefix.shape[1]
    return flops.Play(
        dialogues=batch,
        profiles=profiles,
        rows=rows,
        prefixes=profiles if rows == batch and shares(profiles, prefix, config.rollout.group, parts) else rows,
        systems=1 if shares(1, system, rows, parts) else rows,
        system=system,
        prefix=prefix,
        user_reply=config.user.reply_tokens,
        fields=sum(len(script.names) for script in scripts) - 2,  # without the change and the reply
        literals=sum(script.template.shape[0] * script.template.shape[1] for script in scripts),
        field_tokens=config.user.field_tokens,
        reply_tokens=config.user.reply_tokens,
    )


def _sampling(shapes: Shapes) -> dict[str, tuple[Work, str]]:
    agents, play = shapes.agents, play_of(shapes)
    played = rollout_model(shapes.config, agents.policy.model)
    policy, user = (flops.Reader(model.config, model.param_dtype == jnp.int8) for model in (played, agents.user.model))
    return {
        "copy policy": (_copied(agents.policy.model, policy), "copy policy"),
        "copy user": (_copied(agents.user.model, user), "copy user"),
        "prefill": (flops.prefill(policy, user, play), "play"),
        "policy turns": (flops.policy_turns(policy, play, agents.spec), "play"),
        "user turns": (flops.user_turns(user, play, agents.spec), "play"),
        "pack": (Work(0, 0, 0), "pack"),
    }


def _copied(model: Qwen2, played: flops.Reader) -> Work:
    """Reads weights as they are stored, and writes what the sampler reads."""
    count, stored = model.config.num_params, model.param_dtype
    bytes_read = played.stored_bytes if stored == jnp.int8 else float(count * stored.itemsize)
    bytes_written = played.stored_bytes if played.rounded else float(count * model.dtype.itemsize)
    return Work(0, 0, 0, bytes_read + bytes_written)


def _learning(shapes: Shapes) -> dict[str, tuple[Work, str]]:
    """Of dialogues at their limits; sharing a row changes nothing, as the mask keeps them apart."""
    config, mesh, trunk = shapes.config, shapes.mesh, shapes.setup.models.trunk
    length = shapes.lengths[-1] // dialogues_a_row(config, mesh)
    rows, model = config.rollout.batch, shapes.agents.policy.model
    parts = (
        updates_at_most(config) // config.train.epochs * microbatches_at_most(config, mesh, dialogues_an_update(config))
    )
    kl_pass = _forward(model, rows // parts, length, logits=True, parts=1)
    prepared = kl_pass
    if trunk is not None:
        prepared += _forward(trunk, rows, length, logits=False, parts=parts)
    for _ in range(config.loss.recompute + bool(config.loss.kl)):
        prepared += _forward(model, rows, length, logits=True, parts=parts)
    moment = jnp.dtype(config.train.moment_dtype).itemsize
    settings: dict[str, Any] = {"parts": parts, "moment": moment, "frozen": shapes.base is not None}
    update = _update(model, config.policy, rows, length, logits=True, **settings).times(config.train.epochs)
    works = {"values and log-probs": (prepared, "learn"), "policy update": (update, "learn")}
    if trunk is not None:
        critic = _update(trunk, config.critic, rows, length, logits=False, **settings).times(config.train.epochs)
        works["critic update"] = (critic, "learn")
    return works


def _forward(model: Qwen2, rows: int, length: int, *, logits: bool, parts: int) -> Work:
    size = model.param_dtype.itemsize
    return flops.packed_forward(model.config, rows, length, logits=logits, itemsize=size, parts=parts)


def _update(model: Qwen2, c: ConfigDict, rows: int, length: int, **settings: Any) -> Work:
    # Splash, too, computes scores again in its backward pass.
    chunked = c.attention == "splash" or (c.attention == "chunked" and length > c.attention_chunk)
    settings |= {"itemsize": model.param_dtype.itemsize, "remat": c.remat, "chunked": chunked}
    return flops.packed_update(model.config, rows, length, **settings)
