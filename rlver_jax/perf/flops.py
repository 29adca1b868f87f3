"""Floating-point operations and bytes of a training step, by formula: loops that the compiler counts once are counted.

A product of [M, K] and [K, N] is 2 M K N operations. Elementwise work (norms, rotations, softmax) is left out: it is a
few hundredths, as the test against the compiler's own count shows.
"""

import dataclasses

from rlver_jax.decoding.cache import pieces
from rlver_jax.models.families import Qwen2Config
from rlver_jax.rollout.spec import RolloutConfig

ITEM = 2  # bytes of bfloat16: of the sampler's copies and caches


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase does over all chips.

    Attributes:
        useful: operations that the mathematics asks for; what utilization is measured by.
        flops: operations that run: layers that are computed again for the backward pass included.
        weight_bytes: of weights as products read them, once for each pass; chips along `tensor` share them.
        spread_bytes: of caches, and of weights and moments in the optimizer; all chips share them.
        column_bytes: of weights whose columns chips along `tensor` and `attention_data` share.
    """

    useful: float
    flops: float
    weight_bytes: float
    spread_bytes: float = 0.0
    column_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(*map(dataclasses.astuple, (self, other)), strict=True)))

    def times(self, n: float) -> "Work":
        """The same n times."""
        return Work(*(n * value for value in dataclasses.astuple(self)))


def attention_matrices(c: Qwen2Config) -> list[tuple[int, int]]:
    """Rows and columns of the weight matrices of a layer's attention."""
    q, kv, d = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    return [(d, q), (d, kv), (d, kv), (q, d)]


def mlp_matrices(c: Qwen2Config) -> list[tuple[int, int]]:
    """Rows and columns of those of its MLP."""
    d, f = c.hidden_size, c.intermediate_size
    return [(d, f), (d, f), (f, d)]


def layer_flops(c: Qwen2Config, tokens: float) -> float:
    """Weight products of all layers for so many tokens."""
    weights = sum(rows * columns for rows, columns in (*attention_matrices(c), *mlp_matrices(c)))
    return 2.0 * tokens * weights * c.num_layers


def attention_flops(c: Qwen2Config, pairs: float) -> float:
    """Scores and weighted values of all layers for so many pairs of a query and a key in its attention mask."""
    return 4.0 * pairs * c.num_heads * c.head_dim * c.num_layers


def head_flops(c: Qwen2Config, tokens: float) -> float:
    """Logits over the vocabulary for so many tokens."""
    return 2.0 * tokens * c.hidden_size * c.vocab_size


def cache_token_bytes(c: Qwen2Config, itemsize: int) -> int:
    """Keys and values of one token."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * itemsize


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model as the sampler reads it.

    Attributes:
        rounded: weight matrices of layers are int8, with a float32 for each column; all else is bfloat16.
    """

    config: Qwen2Config
    rounded: bool = False

    @property
    def stored_bytes(self) -> float:
        """Of all parameters."""
        rest = self.config.num_params - layer_flops(self.config, 1) / 2
        return self._bytes(attention_matrices(self.config)) + self._bytes(mlp_matrices(self.config)) + ITEM * rest

    @property
    def column_bytes(self) -> float:
        """Of MLPs and the head, that one forward pass reads."""
        c = self.config
        return self._bytes(mlp_matrices(c)) + ITEM * c.vocab_size * c.hidden_size

    @property
    def pass_bytes(self) -> float:
        """Of all else that it reads: an embedding that isn't the head as well is looked up, row by row."""
        c = self.config
        embedding = ITEM * c.vocab_size * c.hidden_size * (not c.tie_embeddings)
        return self.stored_bytes - self.column_bytes - embedding

    def _bytes(self, matrices: list[tuple[int, int]]) -> float:
        """Of such matrices in all layers."""
        one = sum(columns * (rows + 4 if self.rounded else ITEM * rows) for rows, columns in matrices)
        return float(self.config.num_layers * one)


def forward_passes(
    model: Reader, rows: float, tokens: float, before: float, *, logits: float, passes: float, shared: float = 0.0
) -> Work:
    """Forward passes over `tokens` tokens of each of `rows` rows, whose contexts hold `before` others.

    Args:
        passes: so many, for all tokens together.
        logits: positions of each row whose logits are computed.
        shared: tokens of all rows' contexts that are not read, as others' reading of the same ones serves them.
    """
    c, pairs = model.config, rows * tokens * (before + (tokens + 1) / 2)
    flops = layer_flops(c, rows * tokens) + attention_flops(c, pairs) + head_flops(c, rows * logits)
    context = before + tokens / 2
    cache = cache_token_bytes(c, ITEM) * (passes * (rows * context - shared) + rows * tokens)
    columns = model.column_bytes - ITEM * c.vocab_size * c.hidden_size * (not logits)
    return Work(flops, flops, passes * model.pass_bytes, cache, passes * columns)


def packed_forward(c: Qwen2Config, rows: int, length: int, *, logits: bool, itemsize: int, parts: int) -> Work:
    """Hidden states of packed rows, and their log-probs; each of `parts` parts of the batch reads the weights once."""
    pairs = rows * length * (length + 1) / 2
    flops = layer_flops(c, rows * length) + attention_flops(c, pairs) + logits * head_flops(c, rows * length)
    return Work(flops, flops, parts * itemsize * c.num_params)


def packed_update(
    c: Qwen2Config,
    rows: int,
    length: int,
    *,
    logits: bool,
    itemsize: int,
    parts: int,
    remat: str,
    chunked: bool,
    moment: int = 4,
    frozen: bool = False,
) -> Work:
    """Forward and backward pass over packed rows, and the optimizer.

    Args:
        itemsize: bytes of a weight as it is stored; moment: of Adam's first moment. Gradients and the second moment
            are float32.
        frozen: no weight has a gradient: an adapter is trained on them, whose own part is left out.

    Backward costs twice the forward products. remat=full computes every layer but its last product once more, chunked
    attention its scores, half of its products, once more, and log-probs their logits. The optimizer reads gradients,
    and reads and writes weights and moments.
    """
    forward = packed_forward(c, rows, length, logits=logits, itemsize=itemsize, parts=parts)
    pairs = rows * length * (length + 1) / 2
    again = logits * head_flops(c, rows * length)
    if remat == "full":
        down = 2.0 * rows * length * c.intermediate_size * c.hidden_size * c.num_layers  # its result is not asked for
        again += layer_flops(c, rows * length) - down + attention_flops(c, pairs)
    elif remat == "dots":
        again += attention_flops(c, pairs)
    if chunked:
        again += attention_flops(c, pairs) / 2
    weights = (3 if remat == "none" else 4) * forward.weight_bytes
    optimizer = (4 + 2 * (itemsize + moment + 4)) * c.num_params
    if frozen:
        useful = 3 * forward.useful - layer_flops(c, rows * length) - logits * head_flops(c, rows * length)
        return Work(useful, useful + again, weights, 0.0)
    return Work(3 * forward.useful, 3 * forward.useful + again, weights, optimizer)


@dataclasses.dataclass(frozen=True)
class Play:
    """Lengths of a batch of dialogues, all at their limits, in tokens.

    Attributes:
        dialogues: of a batch; profiles: of them.
        rows: dialogues played at a time.
        prefixes: copies of profiles' prompts in their caches; systems: of the policy's prompt. As many as rows, or
            fewer, which rows share.
        system: of the policy's prompt; prefix: of the user's.
        user_reply: of a user's reply.
        fields: generated by the user in one turn before its reply.
        literals: of both scripts, read in one turn.
        field_tokens, reply_tokens: limits of each.
    """

    dialogues: int
    profiles: int
    rows: int
    prefixes: int
    systems: int
    system: int
    prefix: int
    user_reply: int
    fields: int
    literals: int
    field_tokens: int
    reply_tokens: int

    @property
    def rounds(self) -> int:
        """Times that all rows are filled with dialogues."""
        return -(-self.dialogues // self.rows)

    @property
    def user_steps(self) -> int:
        """Decode steps of the user in one turn."""
        return self.fields * self.field_tokens + self.reply_tokens


def prefill(policy: Reader, user: Reader, play: Play) -> Work:
    """Each profile, and the policy's system prompt, once."""
    own = forward_passes(policy, 1, play.system, 0, logits=0, passes=pieces(play.system))
    return own + forward_passes(user, play.profiles, play.prefix, 0, logits=0, passes=pieces(play.prefix))


def policy_turns(policy: Reader, play: Play, spec: RolloutConfig) -> Work:
    """All replies of the policy: prefill of the user's words, then one decode step a token."""
    growth = play.user_reply + spec.say_tokens
    average, steps = play.system + growth * spec.max_turns / 2, spec.policy_tokens
    shared = (play.rows - play.systems) * play.system
    prefilled = forward_passes(policy, play.rows, growth, average, logits=0, passes=pieces(growth), shared=shared)
    decoded = forward_passes(policy, play.rows, steps, average, logits=steps, passes=steps, shared=shared)
    return (prefilled + decoded).times(spec.max_turns * play.rounds)


def user_turns(user: Reader, play: Play, spec: RolloutConfig) -> Work:
    """All reactions of the user: appraisal, choice and reply."""
    growth = play.user_reply + spec.say_tokens
    average = play.prefix + growth * spec.max_turns / 2
    shared, passes = (play.rows - play.prefixes) * play.prefix, pieces(growth) + play.fields + 2
    prefilled = forward_passes(user, play.rows, growth + play.literals, average, logits=0, passes=passes, shared=shared)
    steps = play.user_steps
    decoded = forward_passes(user, play.rows, steps, average + play.literals, logits=steps, passes=steps, shared=shared)
    return (prefilled + decoded).times(spec.max_turns * play.rounds)
