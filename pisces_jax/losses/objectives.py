"""The losses: one value per token, vector or picture, and their masked sums.

A sum and its count stay separate (`masked_average`), so that a loss is normalised over the global batch, whatever the
mesh, the packing and the gradient accumulation are.
"""

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.losses.flow import FlowConfig, interpolate, loss_weight, sample_time, velocity


def masked_average(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Average:
    """The sum and the number of the values where `mask` is True; the others may be anything, even NaN."""
    return Average(total=jnp.sum(jnp.where(mask, values, 0.0)), count=jnp.sum(mask).astype(jnp.float32))


def next_token_targets(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The next token of each position, and whether it counts: it is in the same segment and in `loss_mask`."""
    following = jnp.roll(tokens, -1, axis=1)
    counts = jnp.roll(loss_mask, -1, axis=1) & (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids > 0)
    return following, counts.at[:, -1].set(False)


def vector_error(predicted: Float[Array, "*B C"], target: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """The squared error of each vector, averaged over its dimensions, in float32 (Pisces, arXiv 2506.10395)."""
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)


def cosine_error(predicted: Float[Array, "*B C"], target: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """One minus the cosine between each vector and its target, in float32 (MetaMorph, arXiv 2412.14164)."""
    a, b = (x.astype(jnp.float32) for x in (predicted, target))
    lengths = jnp.sum(jnp.square(a), -1) * jnp.sum(jnp.square(b), -1)
    return 1 - jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(lengths, 1e-12))


VECTOR_ERRORS = {"mse": vector_error, "cosine": cosine_error}


def flow_matching(
    network: object, data: Float[Array, "B ..."], condition: Array, keys: Array, config: FlowConfig
) -> Float[Array, "B"]:
    """The weighted squared error of the velocity per picture, averaged over the picture's elements.

    Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747).

    Args:
        network: `(x, t, condition, keep) -> output`, as in `flow.guided`.
        keys: a random key per picture [B]; the picture's time, noise and condition dropout depend on it alone.
    """

    def draws(key: Array) -> tuple[Array, Array, Array]:
        time, noise, drop = jax.random.split(key, 3)
        kept = jax.random.uniform(drop) >= config.drop
        return sample_time(time, config), jax.random.normal(noise, data.shape[1:]), kept

    t, noise, keep = jax.vmap(draws)(keys)
    x = interpolate(noise, data, t)
    v = velocity(network(x, t, condition, keep), x, t, config)  # type: ignore[operator]
    error = jnp.mean(jnp.square(v - (data - noise)), axis=tuple(range(1, data.ndim)))
    return loss_weight(t, config) * error


def words_of_pictures(
    scores: Float[Array, "B N V"],
    tokens: Int[Array, "B L"],
    real: Bool[Array, "B L"],
    valid: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """How well the vectors of a picture predict which tokens its text contains: a sum of binary cross-entropies.

    The sum goes over all tokens that any text of the batch contains. Tokens as labels, without a text encoder, are
    from SuperClass (Huang et al. 2024, arXiv 2411.03313), which has a softmax over the vocabulary from one pooled
    vector. Here the score of a token for a picture is log mean exp of its scores over the vectors, so that only the
    vectors that show a thing need to name it.

    Args:
        scores: of every vector and token of the vocabulary.
        real: False on padding of the texts.
        valid: False for pictures whose texts do not count. Their losses are to be masked.
    """
    B, _, V = scores.shape
    rows = jnp.broadcast_to(jnp.arange(B)[:, None], tokens.shape)
    there = jnp.zeros((B, V), bool).at[rows, tokens].max(real & valid[:, None])
    score = jax.nn.logsumexp(scores.astype(jnp.float32), axis=1) - jnp.log(scores.shape[1])
    error = jax.nn.softplus(jnp.where(there, -score, score))
    return jnp.sum(jnp.where(there.any(axis=0), error, 0.0), axis=-1)


def sigmoid_contrastive(
    pictures: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    valid: Bool[Array, "B"],
    same: Bool[Array, "B B"],
) -> Float[Array, "B"]:
    """SigLIP's loss per picture (Zhai et al. 2023, arXiv 2303.15343, section 3.2).

    −Σ_j log σ(z_ij (scale·x_i·y_j + bias)), where z_ij is 1 if the text of picture i is the `same` as text j and −1
    otherwise. Texts that repeat in a batch, such as class labels, are right for several pictures (as in UniCL, Yang et
    al. 2022, arXiv 2204.03610).

    Args:
        pictures, texts: unit vectors.
        valid: False for pairs that do not count, neither as pictures nor as texts; their loss is 0.
        same: [i, j] is True where texts i and j are the same, so True on the diagonal.
    """
    logits = jnp.exp(log_scale) * jnp.einsum("BE,ZE->BZ", pictures, texts) + bias
    signs = jnp.where(same, 1.0, -1.0)
    return -jnp.sum(jnp.where(valid[:, None] & valid[None], jax.nn.log_sigmoid(signs * logits), 0.0), axis=-1)


def softmax_contrastive(
    pictures: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    valid: Bool[Array, "B"],
    same: Bool[Array, "B B"],
) -> Float[Array, "B"]:
    """CLIP's loss per pair (Radford et al. 2021, arXiv 2103.00020, figure 3).

    The mean of two cross-entropies: of the texts given picture i, and of the pictures given text i. Texts that are the
    `same` share the target probability equally (UniCL). Arguments as in `sigmoid_contrastive`.
    """
    logits = jnp.exp(log_scale) * jnp.einsum("BE,ZE->BZ", pictures, texts)
    both = valid[:, None] & valid[None]
    right = (same & both).astype(logits.dtype)
    right = right / jnp.maximum(right.sum(axis=1, keepdims=True), 1)  # `same` is symmetric

    def cross_entropy(logits: Array) -> Array:
        shares = jax.nn.log_softmax(jnp.where(both, logits, jnp.finfo(logits.dtype).min), axis=1)
        return -jnp.sum(right * shares, axis=1)

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2
