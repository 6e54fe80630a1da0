"""The losses: each a sum over its own tokens, vectors or pictures, and their count.

Totals and counts are kept apart so that a loss is normalised over the global batch, whatever the mesh, the packing
or the accumulation.
"""

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.losses.flow import FlowConfig, interpolate, loss_weight, sample_time, velocity


def masked_average(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Average:
    """The sum of the values where `mask` holds, and how many they are."""
    return Average(total=jnp.sum(jnp.where(mask, values, 0.0)), count=jnp.sum(mask).astype(jnp.float32))


def next_token_targets(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What each position is to predict, and whether it counts: the next token of the same segment, if it is learned."""
    following = jnp.roll(tokens, -1, axis=1)
    counts = jnp.roll(loss_mask, -1, axis=1) & (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids > 0)
    return following, counts.at[:, -1].set(False)


def vector_error(predicted: Float[Array, "*B C"], target: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Squared error of each vector, the mean over its dimensions, in float32."""
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)


def flow_matching(
    network: object, data: Float[Array, "B ..."], condition: Array, keys: Array, config: FlowConfig
) -> Float[Array, "B"]:
    """Weighted squared velocity error a picture, the mean over its elements (conditional flow matching).

    Args:
        network: `(x, t, condition, keep) -> output`.
        keys: one random key a picture [B]; its time, noise and condition dropout come from it alone.
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
    """How well a picture's vectors tell which words its text has: binary cross-entropies of its tokens, and of those
    of the batch's other texts, which it has not, summed, from `scores` of every vector and token of the vocabulary.

    Words as labels, without a text encoder (SuperClass, Huang et al. 2024, arXiv 2411.03313; there softmax over the
    vocabulary from one pooled vector). A word's score for the picture is the log of the mean of the exponentials of
    its vectors' scores, so that the vectors of what it names answer for it, and those of other things need not.
    Texts and pictures that are not `valid` take no part.
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
    """SigLIP's loss (Zhai et al. 2023, equation 1), a picture: −Σ_j log σ(z_ij (scale·x_i·y_j + bias)), z = ±1.

    z is 1 where picture i's text is the `same` as text j, the diagonal among them: where names repeat within a batch,
    as class labels do, another picture's text may be right for this one too (as in UniCL, Yang et al. 2022,
    arXiv 2204.03610). Pairs that are not `valid` take no part, neither as pictures nor as other pictures' texts.
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
    """CLIP's loss (Radford et al. 2021), a pair: the mean of both cross-entropies, of text j given picture i and of
    picture j given text i.

    Where several pictures of the batch have the `same` text, each is as right as the other (UniCL, as in
    `sigmoid_contrastive`). Pairs that are not `valid` take no part; for them 0.
    """
    logits = jnp.exp(log_scale) * jnp.einsum("BE,ZE->BZ", pictures, texts)
    both = valid[:, None] & valid[None]
    right = (same & both).astype(logits.dtype)
    right = right / jnp.maximum(right.sum(axis=1, keepdims=True), 1)  # `same` is symmetric

    def cross_entropy(logits: Array) -> Array:
        shares = jax.nn.log_softmax(jnp.where(both, logits, jnp.finfo(logits.dtype).min), axis=1)
        return -jnp.sum(right * shares, axis=1)

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2
